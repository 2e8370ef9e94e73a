"""One module as a user wrote it: what it holds, and how it is called.

Open `signature.py` first, which matches the parameters of a module's call with what a stack has to
give. `modes.py` tells norms and dropout whether they train, `row_keys.py` makes random numbers that
no mesh changes, `given.py` knows modules that have values already, `parts.py` takes a module apart,
and `captured.py` and `computation.py` read what a call computes from its jaxpr.
"""
