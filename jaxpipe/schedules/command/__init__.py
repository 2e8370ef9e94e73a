"""The command line `python -m jaxpipe.schedules`.

Open `cli.py` first; `arguments.py` declares the flags, `compare.py` makes the table of `compare`.
"""
