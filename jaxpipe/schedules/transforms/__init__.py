"""Transforms of finished schedules, whatever family they are of.

`backward.py` fuses, splits or defers backward passes; the others add optional actions: recompute,
vocabulary passes (with `shift.py`), optimizer steps with validation, fillers.
"""
