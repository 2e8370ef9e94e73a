"""Splits one layer into forward (F), recompute (R), input gradient (I) and weight gradient (W).

Open `split.py` first. It traces the layer together with its derivative to one list of equations
(`trace.py`, `tape.py`) and takes from that list the equations that each action needs
(`equations.py`, `slices.py`); `residuals.py` says which intermediate values F keeps. `varying.py`
has the types that JAX gives to values inside `shard_map`, `interpret.py` runs equations one by one.
"""
