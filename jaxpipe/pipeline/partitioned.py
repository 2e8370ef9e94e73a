"""Cuts a stack into stages by the cost of its layers, and so joins the stack to the partitioner.

The partitioner (`jaxpipe.schedules.partition`) knows numbers alone. This module counts or times the
stack's layers, asks it for the number of layers of each stage, and returns the stack with these.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxpipe.pipeline.costs.layer_costs import layer_costs
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.schedules import Schedule
from jaxpipe.schedules.partition import Partition, best, cut
from jaxpipe.stack.context import map_entries
from jaxpipe.stack.stack import LayerStack

Tree = Any


def partitioned(
  stack: LayerStack,
  schedule: Schedule,
  example_batch: Tree,
  method: str | Sequence[int] = "best",
  *,
  shards: int = 1,
  measured: bool = False,
  residuals: str | Policy = AUTO,
) -> tuple[LayerStack, Partition]:
  """Returns the stack with a partition, and the partition itself.

  Layers that are alike run as a loop only if every stage has equally many of them. With any other
  partition, the stack is packed: each stage is a function of its own over a flat row of parameters.

  Args:
    stack: whose layers are to be cut.
    schedule: says into how many stages; `best` looks for the shortest simulated step of its order.
    example_batch: a batch or its shapes, leaves `[B, ...]`.
    method: `best`, `balanced` (the most expensive stage as cheap as can be), `variance` (GPipe's),
      `parameters`, `uniform`, `type:REGEX`, which counts layers whose class it matches, or the
      number of layers of each stage, such as `3,2,4` or `[3, 2, 4]`.
    shards: number of devices over which the rows of a microbatch lie.
    measured: whether to time each layer on this process's first device instead of counting FLOPs.
    residuals: what F keeps, which decides what a backward costs; as for `pipeline_value_and_grad`.

  Returns:
    The stack, unchanged if it is uniform and every stage gets equally many layers; and the
    partition with the costs of the layers, which prints as a table.

  Raises:
    ValueError: an unknown method, or too few layers.
  """
  sizes = _numbers(method)
  if sizes:
    # Here and not only at the end: numbers that do not fit are refused before layers are timed.
    stack = dataclasses.replace(stack, partition=sizes)
  slices = schedule.microbatches * shards

  def rows_of_device(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((leaf.shape[0] // slices, *leaf.shape[1:]), leaf.dtype)

  microbatch = map_entries(rows_of_device, lambda entry: entry, example_batch)
  costs = layer_costs(stack, microbatch, measured=measured, residuals=residuals)
  if sizes:
    found = Partition(layers=tuple(costs), sizes=sizes)
  elif method == "best":
    found = best(costs, schedule, empty=True).partition
  else:
    found = cut(costs, schedule.stages, str(method), empty=True)
  # A partition would pack the stack, which without one has equally many layers in a stage anyway.
  if mode_of(stack).looped and len(set(found.sizes)) == 1:
    return stack, found
  return dataclasses.replace(stack, partition=found.sizes), found


def _numbers(method: str | Sequence[int]) -> tuple[int, ...]:
  """Number of layers of each stage where `method` says it itself; empty for a name."""
  if not isinstance(method, str):
    return tuple(method)
  return tuple(map(int, method.split(","))) if re.fullmatch(r"\d+(,\d+)*", method) else ()
