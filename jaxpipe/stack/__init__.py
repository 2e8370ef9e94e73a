"""The network as the pipeline sees it: pure functions of one tree, made from the user's modules.

Open `stack.py` first: `LayerStack`, embedding, layers and head. `from_modules.py` takes a plain
list of modules, `packed.py` lays stages that are not alike into rows of one width.
"""
