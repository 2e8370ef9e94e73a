"""What an experiment script calls: parse the flags, then train, resume, or print a dry run.

Open `task.py` first, which says what an experiment provides, then `task_run.py`.
"""
