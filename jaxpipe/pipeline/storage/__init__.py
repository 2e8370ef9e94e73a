"""Buffers in which one action leaves values for a later one.

Open `rings.py` first: arrays with numbered slots. `pools.py` keeps the saved values of uniform
layers, `arenas.py` those of stages that are not alike.
"""
