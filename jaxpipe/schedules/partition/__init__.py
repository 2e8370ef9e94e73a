"""Partitions: cuts a list of layers into stages, by a rule or so that a schedule ends first.

  plan = best(layers, "1f1b", devices=4, microbatches=8)
  print(plan.report())

Open `partition.py` first, the value, then `rules.py` for simple cuts, or `best.py` and `solve.py`
for the search below which `orders.py`, `critical.py`, `rows.py` and `minimax.py` lie.
"""

from jaxpipe.schedules.partition.best import best
from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.schedules.partition.partition import Partition
from jaxpipe.schedules.partition.plan import Plan
from jaxpipe.schedules.partition.rules import (
  balanced,
  by_parameters,
  by_pattern,
  by_variance,
  cut,
  uniform,
)

__all__ = [
  "LayerCost",
  "Partition",
  "Plan",
  "balanced",
  "best",
  "by_parameters",
  "by_pattern",
  "by_variance",
  "cut",
  "uniform",
]
