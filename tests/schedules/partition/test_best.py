"""`best` against every partition there is, each simulated."""

import itertools
import math
import random

import pytest

from jaxpipe.schedules import Costs, Kind, Placement, Schedule, make_schedule, simulate
from jaxpipe.schedules.partition import LayerCost, Partition, best
from jaxpipe.schedules.partition.best import FIXED
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.spec import Spec

# name, P, V
SHAPES = [
  ("gpipe", 3, None),
  ("1f1b", 2, None),
  ("1f1b", 3, None),
  ("1f1b", 4, None),
  ("zb-h1", 3, None),
  ("zb-h2", 4, None),
  ("interleaved-1f1b", 2, 2),
  ("interleaved-1f1b", 3, 2),
  ("looped-bfs", 2, 3),
  ("hanayo", 2, 2),
  ("chimera", 4, None),
  ("bitpipe", 2, None),
  ("dualpipe", 4, None),
]
CASES = range(500)


def drawn_layers(draw, count):
  """Random layers in whole numbers, some of them far heavier than others."""
  scale = [draw.choice((1, 1, 4)) for _ in range(count)]
  return [
    LayerCost(f"layer {i}", *(x * draw.randint(0, 9) for _ in "FIW"), x, draw.randint(0, 9), 1)
    for i, x in enumerate(scale)
  ]


def every_partition(layers, stages, least=1):
  """All ways to cut the layers into stages of at least so many."""
  L = len(layers)
  for inner in itertools.combinations_with_replacement(range(L + 1), stages - 1):
    sizes = [b - a for a, b in itertools.pairwise((0, *inner, L))]
    if min(sizes) >= least:
      yield Partition(layers=tuple(layers), sizes=tuple(sizes))


def holds(partition, timeline):
  """What each device holds, by the simulator's own peak."""
  table = timeline.schedule.placement.table
  return [
    peak + sum(partition.stages[s].parameters for s in row)
    for peak, row in zip(timeline.peak_memory, table, strict=True)
  ]


def brute_force(layers, schedule_of, stages, hop, limits=None, least=1):
  """The least makespan of all partitions that fit; infinite if none does."""
  found = math.inf
  for partition in every_partition(layers, stages, least):
    costs = partition.costs(hop)
    try:
      timeline = simulate(schedule_of(partition, costs), costs, partition.memory)
    except ValueError:
      continue
    if limits is None or all(x <= y for x, y in zip(holds(partition, timeline), limits)):
      found = min(found, timeline.makespan)
  return found


def drawn_case(seed):
  """A schedule, its layers, a hop and limits (or None) from one seed."""
  draw = random.Random(seed)
  name, P, V = SHAPES[seed % len(SHAPES)]
  schedule = make_schedule(name, devices=P, chunks=V, microbatches=draw.choice((2, 4, 6)))
  L = draw.randint(1, 9)
  layers = drawn_layers(draw, L if L >= schedule.stages or draw.random() < 0.3 else 9)
  limits = None
  if draw.random() < 0.6:
    # Between tight and loose: what some partition holds, and a little more or less.
    some = draw.choice(list(every_partition(layers, schedule.stages, 0)))
    held = holds(some, simulate(schedule, some.costs(), some.memory))
    limits = [x + draw.randint(-2, 6) for x in held]
  return schedule, layers, draw.randint(0, 3), limits


@pytest.mark.sampled("seed", CASES, 25)
def test_no_partition_is_better(seed):
  schedule, layers, hop, limits = drawn_case(seed)
  least = int(len(layers) >= schedule.stages)
  expected = brute_force(layers, lambda *_: schedule, schedule.stages, hop, limits, least)
  ask = {"hop": hop, "memory_limit": limits, "empty": True}
  if expected == math.inf:
    with pytest.raises(ValueError, match="fits: with"):
      best(layers, schedule, **ask)
    return
  plan = best(layers, schedule, **ask)
  assert (plan.makespan, plan.proven, plan.gap) == (expected, True, 0)
  assert plan.lower_bound == expected
  assert plan.timeline.makespan == simulate(schedule, plan.partition.costs(hop)).makespan
  assert list(plan.memory) == holds(plan.partition, plan.timeline)
  assert min(plan.partition.sizes) >= least
  if limits:
    assert all(x <= y for x, y in zip(plan.memory, limits, strict=True))
