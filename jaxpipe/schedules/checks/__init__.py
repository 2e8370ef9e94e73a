"""Is a schedule legal? Every error names one action, its device and what it waits for.

Open `legal.py` first; `extras.py` checks the optional kinds of action and `sends.py` whether
transfers of separate processes could dead-lock.
"""
