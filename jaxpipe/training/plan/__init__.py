"""What is decided before the first step: mesh, schedule, optimizer, how state lies on the devices.

Open `plan.py` first; `choose.py` is `schedule="auto"`, `run_dir.py` what a run directory remembers.
"""
