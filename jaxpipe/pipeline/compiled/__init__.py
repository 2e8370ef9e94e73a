"""Reads from an optimized XLA program what a step copies, sends and multiplies, and how often.

These modules check and report; the executor never imports them. Open `step.py` first, which sums up
one compiled step. `hlo.py` parses the text and `walk.py` goes through what runs; `action_paths.py`
says which action an instruction belongs to, by which `traffic.py` and `matmuls.py` count a step.
"""
