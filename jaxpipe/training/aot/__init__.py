"""Compiles a step for TPUs that are not there, and reports its memory, transfers and time.

Open `aot.py` first; `report.py` formats what was found, as `experiments/compile_tpu.py` prints it.
"""
