"""The training loop and all that it writes: metrics, checkpoints, plots, profiles.

Open `loop.py` first, then `step.py`: one pipelined gradient and one optimizer update.
"""
