"""Two backbones in opposite directions, against every pair of partitions."""

import itertools
import random

import pytest

from jaxpipe.schedules import Action, Costs, Kind, make_schedule, simulate
from jaxpipe.schedules.partition import LayerCost, Partition, best
from jaxpipe.schedules.partition.opposite import opposite, two_models

CASES = list(itertools.product(("chimera", "dualpipe", "bitpipe"), range(40)))


def _layers(draw, count):
  return [
    LayerCost(str(i), *(draw.randint(1, 9) for _ in "FIW"), draw.randint(0, 3), draw.randint(0, 3))
    for i in range(count)
  ]


def _cuts(layers, stages):
  for inner in itertools.combinations(range(1, layers), stages - 1):
    yield tuple(b - a for a, b in itertools.pairwise((0, *inner, layers)))


@pytest.mark.sampled("name, seed", CASES, 6)
def test_no_pair_of_partitions_is_better(name, seed):
  draw = random.Random(seed)
  P, M = (2, 3) if name == "bitpipe" else (4, draw.choice((2, 4)))
  stages = 4
  first, second = _layers(draw, draw.randint(4, 6)), _layers(draw, draw.randint(4, 7))
  schedule = two_models(make_schedule(name, devices=P, microbatches=2 * M))
  hop = draw.randint(0, 2)
  limit = draw.choice((None, 24))
  found = None
  for sizes in itertools.product(_cuts(len(first), stages), _cuts(len(second), stages)):
    partition = Partition(layers=[*first, *second], sizes=sum(sizes, ()))
    timeline = simulate(schedule, partition.costs(hop), partition.memory)
    held = [
      peak + sum(partition.stages[s].parameters for s in row)
      for peak, row in zip(timeline.peak_memory, schedule.placement.table, strict=True)
    ]
    if limit is None or max(held) <= limit:
      found = min(found or timeline.makespan, timeline.makespan)
  ask = {"devices": P, "microbatches": M, "schedule": name, "hop": hop, "memory_limit": limit}
  if found is None:
    with pytest.raises(ValueError, match="no partition"):
      opposite(first, second, **ask)
    return
  plan = opposite(first, second, **ask)
  assert (plan.makespan, plan.proven) == (found, True)
  assert sum(plan.partition.sizes[:stages]) == len(first)


@pytest.mark.parametrize("name", ["chimera", "dualpipe", "bitpipe"])
def test_models_run_opposite_ways_and_share_all_devices(name):
  both = two_models(make_schedule(name, devices=4, microbatches=8))
  S = both.stages // 2
  home = both.placement.device
  assert [home(s) for s in range(S)] == [3 - home(S + s) for s in range(S)]
  for row in both.order:
    forwards = {(a.stage, a.microbatch) for a in row if a.kind is Kind.F}
    assert all((stage < S) == (m % 2 == 0) for stage, m in forwards)
  assert both.path(0) == tuple(range(S))
  assert both.path(1) == tuple(range(S, 2 * S))
  assert all(isinstance(step, Action) for row in both.order for step in row)


@pytest.mark.parametrize("name", ["chimera", "bitpipe"])
def test_two_equal_models_take_as_long_as_two_replicas(name):
  schedule = make_schedule(name, devices=4, microbatches=8)
  both = two_models(schedule)
  half = [3 + s % 2 for s in range(schedule.stages)]
  replicas = simulate(schedule, Costs(half, 2, 1, 1))
  models = simulate(both, Costs(half * 2, 2, 1, 1))
  assert (models.start, models.end) == (replicas.start, replicas.end)
  assert models.peak_activations == replicas.peak_activations


def test_side_by_side_is_shorter_than_one_after_the_other():
  draw = random.Random(0)
  first, second = _layers(draw, 20), _layers(draw, 16)
  ask = {"devices": 4, "microbatches": 8}
  together = opposite(first, second, **ask)
  apart = sum(best(model, "1f1b", **ask).makespan for model in (first, second))
  assert together.makespan < apart


def test_a_schedule_without_replicas_is_refused():
  with pytest.raises(ValueError, match="1f1b is on loop, where stages live once; use chimera"):
    two_models(make_schedule("1f1b", devices=2, microbatches=2))


def test_too_few_layers_of_one_model_are_refused():
  draw = random.Random(0)
  with pytest.raises(ValueError, match="3 layers cannot fill 4 stages"):
    opposite(_layers(draw, 9), _layers(draw, 3), devices=4, microbatches=4)
