"""The network as the pipeline sees it: pure functions of one tree, made from the user's modules.

Open `stack.py` first: `LayerStack`, embedding, layers and head. Then:

    network.py        the modules in order, and the canonical tree of their parameters
    kinds.py          which layers are of one kind; `layer_trace.py` traces one of them
    module_spec.py    one module as data; `module/` has how a user's module is called
    protocol.py       what placing, executor and costs ask of a stack that lies on devices
    packed.py         how stages that are not alike lie in rows of one width
    from_modules.py   a plain list of modules as a stack; `linen.py` for Linen's
    vocabulary.py     embedding and head in parts, for tables that are cut over the stages
    forward.py        a trained network as its Flax modules, on one device
"""
