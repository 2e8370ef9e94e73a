"""Updates by an optax transformation, variable by variable, on trees that lie placed on a mesh.

Begin with `by_variable.py`, which is the public function. In the order of an update:

    variables.py    which variables a stack has, and where each lies in a placed tree
    slots.py        what a transformation keeps for each variable, as arrays on the mesh
    dataflow.py     the transformation traced on one leaf per variable, as a list of operations
    division.py     the operations divided: those of one variable, and those that join variables
    cuts.py         one variable's piece on a device: reading, joining and cutting it
    pieces.py       operations on pieces, joined only where an operation looks at whole tensors
    lots.py         in which order results are computed, so that few are held at a time
    program.py      the program of one device: loops over the variables that it holds
    by_variable.py  tracing, dividing and running, as an optax transformation
"""
