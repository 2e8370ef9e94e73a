"""Published schedules, a module for each family; `jaxpipe.schedules.registry` lists them all.

Open `one_f_one_b.py` first: each module draws its figure, then builds the lists that it shows.
"""
