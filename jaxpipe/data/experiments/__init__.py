"""The data sets that the experiments read: images, graphs, speech and names.

Each module turns one source into arrays or batches of plain numpy. Open `digits.py` first;
`examples.py` deals shuffled rows into batches for most of them.
"""
