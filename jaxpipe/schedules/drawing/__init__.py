"""Draws a simulated schedule: in the terminal, as a picture, or as a trace for Perfetto.

Open `text.py` first; `figure.py` and `panels.py` draw with matplotlib.
"""
