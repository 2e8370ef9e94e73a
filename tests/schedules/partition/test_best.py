"""`best` against every partition there is, each simulated."""

import dataclasses
import itertools
import math
import random

import pytest

from jaxpipe.schedules import make_schedule, simulate
from jaxpipe.schedules.partition import LayerCost, Partition, best, uniform
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
  ("hanayo", 2, 2),  # with the order that it has at equal costs
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
    if limits is None or all(
      x <= y for x, y in zip(holds(partition, timeline), limits, strict=True)
    ):
      found = min(found, timeline.makespan)
  return found


def drawn_case(seed):
  """A schedule, its layers, a hop and limits (or None) from one seed."""
  draw = random.Random(seed)
  name, P, V = SHAPES[seed % len(SHAPES)]
  schedule = make_schedule(name, devices=P, chunks=V, microbatches=draw.choice((2, 4, 6)))
  L = draw.randint(1, 9)
  layers = drawn_layers(draw, L if schedule.stages <= L or draw.random() < 0.3 else 9)
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


@pytest.mark.sampled("seed", CASES, 15)
def test_what_is_not_proven_is_bounded(seed):
  schedule, layers, hop, _ = drawn_case(seed)
  ask = {"hop": hop, "empty": True}
  expected = best(layers, schedule, **ask)
  found = best(layers, schedule, effort=0, **ask)
  assert found.lower_bound <= expected.makespan <= found.makespan
  assert found.proven == (found.lower_bound == found.makespan)
  assert found.gap == (0 if found.proven else 1 - found.lower_bound / found.makespan)


@pytest.mark.sampled("seed", range(200), 10)
def test_no_partition_is_better_where_wide_boundaries_take_longer(seed):
  draw = random.Random(seed)
  name, P, V = draw.choice(SHAPES[:8])
  schedule = make_schedule(name, devices=P, chunks=V, microbatches=4)
  layers = [
    dataclasses.replace(layer, output=draw.choice((1, 4, 16))) for layer in drawn_layers(draw, 8)
  ]
  hop, bandwidth = draw.randint(0, 2), draw.choice((1, 2, 4))

  def hop_of(partition):
    return hop + max(stage.output for stage in partition.stages[:-1]) / bandwidth

  expected = min(
    simulate(schedule, partition.costs(hop_of(partition))).makespan
    for partition in every_partition(layers, schedule.stages)
  )
  plan = best(layers, schedule, hop=hop, bandwidth=bandwidth)
  assert (plan.makespan, plan.proven, plan.lower_bound) == (expected, True, expected)
  # What was found in the turn of a wider boundary was charged for that.
  assert plan.hop == hop_of(plan.partition)
  equal = uniform(layers, schedule.stages)
  assert plan.uniform == simulate(schedule, equal.costs(hop_of(equal))).makespan


@pytest.mark.parametrize("unit", [1, 0.1])
@pytest.mark.sampled("seed", range(100), 6)
def test_what_just_fits_fits(seed, unit):
  schedule, layers, _, _ = drawn_case(seed)
  layers = [
    dataclasses.replace(x, parameters=unit * x.parameters, activations=unit * x.activations)
    for x in layers
  ]
  free = best(layers, schedule, empty=True)
  tight = best(layers, schedule, empty=True, memory_limit=free.memory)
  assert (tight.makespan, tight.proven) == (free.makespan, True)


def test_an_effort_too_small_is_no_proof():
  layers = drawn_layers(random.Random(0), 20)
  ask = {"devices": 4, "microbatches": 4, "chunks": 2}
  hasty = best(layers, "interleaved-1f1b", effort=10, **ask)
  assert not hasty.proven
  assert 0 < hasty.gap < 0.5
  assert f"at most {hasty.gap:.2%} above the best" in hasty.report()
  assert hasty.looked < 20
  thorough = best(layers, "interleaved-1f1b", **ask)
  assert thorough.proven
  assert hasty.lower_bound < thorough.makespan < hasty.makespan


# Planned around the costs: bounds hold for every order, and each candidate is planned anew.
PLANNED = [
  ("zb-auto", {}),
  ("hanayo", {"chunks": 2}),
  ("bitpipe", {}),
  ("zeropp", {"chunks": 2}),
  ("1f1b", {"backward": "deferred"}),
  ("dualpipe-v", {}),
  ("skippipe", {"visits": 2}),
]


@pytest.mark.sampled("seed", range(60), 6)
def test_no_partition_is_better_where_the_order_is_planned(seed):
  draw = random.Random(seed)
  name, options = PLANNED[seed % len(PLANNED)]
  P = 3 if name == "skippipe" else 2
  ask = {"devices": P, "microbatches": 3, **options}
  layers = drawn_layers(draw, 5)
  hop = draw.randint(0, 2)
  stages = make_schedule(name, **ask).stages
  limit = draw.choice((None, 30, 45, 60)) if name == "zb-auto" else None

  def planned(partition, costs):
    if limit is None:
      return make_schedule(name, costs=costs, memory=partition.memory, **ask)
    room = [limit - stage.parameters for stage in partition.stages]
    return make_schedule(name, costs=costs, memory=partition.memory, memory_limit=room, **ask)

  expected = brute_force(layers, planned, stages, hop)
  if expected == math.inf:
    with pytest.raises(ValueError, match="no partition of 5 layers in 2 stages fits"):
      best(layers, name, hop=hop, memory_limit=limit, **ask)
    return
  plan = best(layers, name, hop=hop, memory_limit=limit, effort=10**6, **ask)
  assert (plan.makespan, plan.proven) == (expected, True)


@pytest.mark.parametrize("limit", [None, 60])
def test_a_function_of_the_costs_plans_its_own_order(limit):
  layers = drawn_layers(random.Random(8), 6)

  def deferred(costs):
    return make_schedule("1f1b", devices=2, microbatches=4, backward="deferred", costs=costs)

  limits = limit and [limit] * 2
  expected = brute_force(layers, lambda _, costs: deferred(costs), 2, 0, limits)
  plan = best(layers, deferred, memory_limit=limit)
  assert plan.makespan == expected
  if limit:
    assert max(plan.memory) <= limit
    assert expected > best(layers, deferred).makespan, "the limit should matter here"


class _Nothing:
  """Costs that must not be looked at."""


@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_families_never_look_at_costs(name):
  family = FAMILIES[name]
  specs = [
    Spec(devices=4, microbatches=M, chunks=family.chunks, costs=_Nothing()) for M in (3, 4, 8, 16)
  ]
  if name in FIXED:
    for spec in specs:
      family.build(spec)
  else:
    with pytest.raises(AttributeError, match="_Nothing"):
      for spec in specs:
        family.build(spec)


def test_a_schedule_and_its_name_agree():
  layers = drawn_layers(random.Random(2), 9)
  named = best(layers, "zb-h1", devices=3, microbatches=5, hop=1)
  given = best(layers, make_schedule("zb-h1", devices=3, microbatches=5), hop=1)
  assert given == named


def test_a_recomputing_schedule_is_partitioned_by_its_forwards():
  layers = drawn_layers(random.Random(3), 7)
  schedule = make_schedule("1f1b", devices=3, microbatches=4, recompute=True)
  expected = brute_force(layers, lambda *_: schedule, 3, 0)
  assert best(layers, schedule).makespan == expected


def test_floats_are_compared_as_the_simulator_does():
  draw = random.Random(5)
  layers = [LayerCost(str(i), *(draw.random() for _ in "FIW")) for i in range(9)]
  schedule = make_schedule("1f1b", devices=3, microbatches=6)
  expected = brute_force(layers, lambda *_: schedule, 3, 0.1)
  assert best(layers, schedule, hop=0.1).makespan == pytest.approx(expected, rel=1e-10)


def test_fifty_layers_on_eight_devices_are_proven():
  draw = random.Random(0)
  layers = [LayerCost(str(i), *(draw.randint(50, 400) for _ in "FIW")) for i in range(50)]
  plan = best(layers, "1f1b", devices=8, microbatches=32)
  assert plan.proven
  assert plan.looked < 2_000
  assert plan.gain > 0


def test_the_report_says_what_was_found():
  layers = [LayerCost(f"layer {i}", t, t, t, 100, 10, 7) for i, t in enumerate((3, 1, 1, 1, 1, 2))]
  plan = best(layers, "1f1b", devices=3, microbatches=4, memory_limit=1_000)
  text = plan.report()
  equal = simulate(plan.timeline.schedule, uniform(layers, 3).costs()).makespan
  assert plan.uniform == equal
  assert plan.gain == 1 - plan.makespan / equal
  assert "1f1b P=3 M=4: makespan 54, bubble" in text
  assert f"proven best\nuniform partition: {equal}, {plan.gain:.1%} saved" in text
  rows = [line.split() for line in text.splitlines()]
  assert ["1", "1-3", "3", "3", "3", "9", "300", "30", "7"] in rows
  assert ["1", "1", "36", "33.3%", "300", "60", "360", "1000"] in rows


LAYERS = [LayerCost(str(i), 1, 1, 1, 10, 2) for i in range(6)]


@pytest.mark.parametrize(
  ("ask", "message"),
  [
    ({"layers": LAYERS[:3]}, "3 layers cannot fill 4 stages; use stages=3 or fewer"),
    ({"chunks": 2, "schedule": "interleaved-1f1b"}, "6 layers cannot fill 8 stages; use stages=6"),
    ({"chunks": 2}, "1f1b has 1 chunk"),
    ({"devices": None}, "1f1b has no sizes with devices=None, microbatches=4; give both"),
    ({"waves": 2}, "1f1b has no option 'waves'"),
    ({"schedule": "2f2b"}, "unknown schedule '2f2b'"),
    ({"bandwidth": 0}, "bandwidth=0 sends nothing; use more than 0"),
    ({"memory_limit": [1, 2]}, "memory_limit lists 2 devices, there are 4"),
    ({"memory_limit": 10}, "holds 28, above memory_limit=10; use memory_limit=28, more devices"),
    ({"schedule": "zb-auto", "memory_limit": 9}, "no partition of 6 layers in 4 stages fits"),
  ],
)
def test_what_cannot_be_is_refused(ask, message):
  ask = {"layers": LAYERS, "schedule": "1f1b", "devices": 4, "microbatches": 4, **ask}
  with pytest.raises(ValueError, match=message) as raised:
    best(ask.pop("layers"), ask.pop("schedule"), **ask)
  assert "\n" not in str(raised.value)


def test_other_actions_are_refused():
  schedule = make_schedule("1f1b", devices=2, microbatches=2, head="sharded")
  with pytest.raises(ValueError, match="S0 is no pass through a stage"):
    best(LAYERS, schedule)


def test_sizes_are_given_with_a_name_only():
  with pytest.raises(ValueError, match="brings its own sizes"):
    best(LAYERS, make_schedule("1f1b", devices=2, microbatches=2), devices=2)
