"""Parts of single experiments beside their networks: the digits' task, translation and its scores.

Open `digits.py` first, the task of three experiments; `translator.py` translates by the search of
`beam.py`, and `bleu.py` scores what it says.
"""
