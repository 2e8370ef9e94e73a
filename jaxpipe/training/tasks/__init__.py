"""What single experiments need beside their network: classifying digits, translating and its score.

Open `digits.py` first; `translator.py` decodes with `beam.py` and is scored by `bleu.py`.
"""
