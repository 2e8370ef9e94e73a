"""The language model's experiment: its flags, loading of known weights, sampling of text.

Open `run.py` first, which puts the pieces of `experiments/lm.py` together; `config.py` holds its
flags.
"""
