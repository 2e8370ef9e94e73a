"""Makes training data of text: files to tokens, tokens to windows, windows to batches.

Open `text.py` first, which prepares a whole data set; `bins.py` holds the format of token files and
`batches.py` the resumable order in which windows are dealt.
"""
