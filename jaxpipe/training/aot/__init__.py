"""Compiles a step for TPUs that are not there, and reports its memory, traffic and estimated time.

Open `aot.py` first; `report.py` prints.
"""
