"""The device mesh: its six axes, where each parameter lies on it, and what layers send over it.

    mesh        builds the mesh and names its axes
    rules       says which dim of which parameter lies over which axes; `redco` writes such rules
                for most transformers
    placing     brings a parameter tree from model order to its places on the mesh, and back
    replicas    sends the weights of stages that live on several devices, and adds their gradients
    flat        lays the leaves of a tree of unlike shapes end to end in one buffer
    axes        sums, gathers and exchanges for layers, which do nothing where there is no mesh
    tensor      how activations enter and leave a part of a layer that is cut over `tensor`
    sequence    how the positions of a row lie over `sequence`, and how devices exchange them
    formulas    what published formulas say that each of these sends
    compiled_packing   packs trees of unlike layers, compiled once for each stack
    protocol    what this package asks of a stack, of a schedule and of a placement

Open `mesh.py` first, then `rules.py` and `placing.py`. No module here imports another part of
jaxpipe.
"""
