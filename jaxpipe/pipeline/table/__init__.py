"""Turns a schedule into the integer table that every device walks, one row a tick.

Open `program.py` first, which describes the table; `lower.py` makes it, `slots.py` gives every
value a slot for as long as it lives, and `unroll.py` divides the ticks into loops.
"""
