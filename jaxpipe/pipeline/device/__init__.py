"""What one device does on one tick, traced inside `shard_map`.

Open `device.py` first: the ten steps of a tick. `build.py` chooses the parts that it is made of,
which `protocols.py` describes: the actions of a stage (looped or switched), embedding and head
(whole, inside the stages, or sharded), and the weights.
"""
