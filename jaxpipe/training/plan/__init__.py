"""Decides, before the first step, on mesh, schedule and optimizer, and where the state lies.

Open `plan.py` first, then `run.py`, which is a plan with its data and run directory; `choose.py` is
`--schedule=auto`, `run_dir.py` what a run directory remembers.
"""
