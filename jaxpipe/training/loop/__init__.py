"""The training loop and all that it writes: metrics, checkpoints, plots, profiles.

Open `loop.py` first, then `step.py`, which is one pipelined gradient and one optimizer update.
"""
