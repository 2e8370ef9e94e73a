"""The command line of an experiment: parse the flags, then train, resume, or print a dry run.

Open `task.py` first, which says what an experiment provides, then `task_run.py`, which makes a run
of it. `launch.py` serves language models (`training/lm/`) as well.
"""
