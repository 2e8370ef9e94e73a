"""Buffers in which one action leaves values for a later one.

Open `rings.py` first: arrays with numbered slots, which the tick table's columns point into.
`pools.py` keeps the saved values of layers that are alike; `arenas.py` and `arena_layout.py` keep
those of unlike stages.
"""
