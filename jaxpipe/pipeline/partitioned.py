"""Cuts a stack into stages, by what its layers cost."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxpipe.pipeline.costs.layer_costs import layer_costs
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.schedules import Schedule
from jaxpipe.schedules.partition import Partition, best, cut
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
  """Returns the stack with a partition, and the partition, which prints as a table.

  Layers that are alike run as a loop only where every stage has as many; else the stack is packed.

  Args:
    stack: whose layers are to be cut.
    schedule: for whose stages; `best` looks for the shortest simulated step of its order.
    example_batch: a batch or its shapes, leaves `[B, ...]`.
    method: `best`, `balanced` (least largest stage), `variance` (GPipe's), `parameters`, `uniform`,
      `type:REGEX`, which counts layers whose class it matches, or numbers such as `3,2,4` or
      `[3, 2, 4]`.
    shards: devices over which the rows of a microbatch lie.
    measured: whether to time each layer on this process's first device, not to count FLOPs.
    residuals: as for `pipeline_value_and_grad`.

  Raises:
    ValueError: an unknown method, or too few layers.
  """
  sizes = _numbers(method)
  if sizes:  # refused before anything is counted
    stack = dataclasses.replace(stack, partition=sizes)
  M = schedule.microbatches * shards
  rows = lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // M, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
  microbatch = jax.tree.map(rows, example_batch)
  costs = layer_costs(stack, microbatch, measured=measured, residuals=residuals)
  if sizes:
    found = Partition(layers=tuple(costs), sizes=sizes)
  elif method == "best":
    found = best(costs, schedule, empty=True).partition
  else:
    found = cut(costs, schedule.stages, str(method), empty=True)
  if stack.uniform and len(set(found.sizes)) == 1:  # what it does anyway, in one loop
    return stack, found
  return dataclasses.replace(stack, partition=found.sizes), found


def _numbers(method: str | Sequence[int]) -> tuple[int, ...]:
  """The sizes, where they are given."""
  if not isinstance(method, str):
    return tuple(method)
  return tuple(map(int, method.split(","))) if re.fullmatch(r"\d+(,\d+)*", method) else ()
