"""What a step takes of memory and time, known before it is compiled.

Open `memory.py` first: bytes by kind for any stack. `packing.py` says what padding costs unlike
stages, and `layer_costs.py` counts or times single layers for the partitioner.
"""
