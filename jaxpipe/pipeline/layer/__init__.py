"""Cuts one layer into forward (F), recompute (R), input gradient (I) and weight gradient (W).

Open `split.py` first. It traces the layer and its derivative to one list of equations (`trace.py`,
`tape.py`) and takes from it the equations that each action needs (`slices.py`); `residuals.py` says
what F keeps.
"""
