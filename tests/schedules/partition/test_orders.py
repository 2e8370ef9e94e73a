"""What bounds a makespan or a memory is never above it."""

import random

import pytest

from jaxpipe.schedules import make_schedule, simulate
from jaxpipe.schedules.partition import LayerCost, Partition
from jaxpipe.schedules.partition.orders import RESOURCES, FixedOrder, PlannedOrder, memory

CASES = [
  (name, V, M)
  for name, V in (
    ("gpipe", 1),
    ("1f1b", 1),
    ("zb-h1", 1),
    ("zb-h2", 1),
    ("zb-auto", 1),
    ("interleaved-1f1b", 2),
    ("hanayo", 2),
    ("chimera", 2),
    ("bitpipe", 4),
    ("dualpipe-v", 2),
    ("skippipe", 1),
  )
  for M in (1, 2, 5)
]


def _stages(draw, count):
  """One layer per stage; some of them take no time for some passes."""
  return [LayerCost(str(i), *(draw.choice((0, 1, 9)) for _ in RESOURCES)) for i in range(count)]


def _value(row, partition):
  return row.constant + sum(
    weight * getattr(stage, name)
    for weights, stage in zip(row.weights, partition.stages, strict=True)
    for weight, name in zip(weights, RESOURCES, strict=True)
  )


@pytest.mark.parametrize(("name", "chunks", "microbatches"), CASES)
def test_rows_bound_every_order(name, chunks, microbatches):
  draw = random.Random(f"{name} {microbatches}")
  example = make_schedule(name, devices=4, chunks=chunks, microbatches=microbatches)
  for hop in (0, 3):
    limits = [100] * example.devices
    planned = PlannedOrder(lambda _: example, hop, example, limits)
    orders = [FixedOrder(example, hop), planned]
    for _ in range(12):
      stages = _stages(draw, example.stages)
      partition = Partition(layers=stages, sizes=[1] * example.stages)
      makespan = simulate(example, partition.costs(hop)).makespan
      held = memory(partition, example)
      for order in orders:
        assert all(_value(row, partition) <= makespan + 1e-9 for row in order.rows())
        rows = order.memory_rows(held)
        assert all(_value(row, partition) <= row.limit for row in rows)
      fixed, _ = orders
      assert fixed.makespan(partition) == makespan
      assert _value(fixed.decisive(partition), partition) == makespan
      # Together these are what each device holds, not only a bound.
      rows = fixed.memory_rows(held)
      assert {
        d for d, x in enumerate(held) if any(_value(row, partition) == x for row in rows)
      } == set(range(4))
