"""Deep Speech 2: convolutions and recurrent layers over spectrograms, trained by the CTC loss.

Open `deep_speech.py` first; `ctc.py` has the loss, the greedy decoder and the edit distance.
"""
