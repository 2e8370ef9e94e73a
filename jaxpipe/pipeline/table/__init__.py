"""Turns a schedule into the integer table that every device walks, one row a tick.

Open `program.py` first, which describes the table, then `lower.py`, which makes it. `transfers.py`
finds what travels between devices, `stage_collectives.py` what all devices do together, and
`slots.py` gives every value a slot for as long as it lives. `unroll.py` divides the ticks into
loops and straight lines (`segment.py`); `tick_times.py` estimates how long they take.
"""
