"""SkipPipe: paths that are legal, balanced, optimal where that can be known, and worth a search."""

import collections
import itertools
import math
import random
import statistics

import pytest

from jaxpipe.schedules import (
  Costs,
  Kind,
  Placement,
  ScheduleError,
  draw_text,
  from_json,
  make_schedule,
  simulate,
  to_json,
)
from jaxpipe.schedules.families import skippipe as module
from jaxpipe.schedules.planning.paths import find_routes
from jaxpipe.schedules.planning.routes import Network, all_routes, dispatch

GRID = [(P, M) for P in range(1, 9) for M in range(1, 25)]
# Twenty devices, of which five hold the first stage.
TWENTY = Placement(tuple((s,) for s, n in enumerate((5, 3, 3, 3, 3, 3)) for _ in range(n)))


def _network(seed, placement, M, k, *, capacity=math.inf, **more):
  """Devices of unlike speed."""
  draw = random.Random(seed)
  forward = tuple(draw.choice((2, 3, 4, 6)) for _ in range(placement.devices))
  return module.make_network(
    placement,
    M,
    k,
    forward=forward,
    backward=tuple(1.5 * time for time in forward),
    capacity=(capacity,) * placement.devices,
    hop=draw.choice((0, 1)),
    **more,
  )


def _spread(visited, S):
  """By how much the stages after the first differ in visits."""
  visits = [visited.count(s) for s in range(1, S)]
  return max(visits, default=0) - min(visits, default=0)


def _random_routes(network, draw):
  """Random skipping within the caps: routes one by one, from the start again where stuck."""
  ways = list(all_routes(network))
  while True:
    counts, routes = collections.Counter(), []
    for _ in range(network.microbatches):
      free = [way for way in ways if all(counts[network.stage(d)] < network.cap for d in way[1:])]
      if not free:
        break
      routes.append(draw.choice(free))
      counts.update(network.stage(d) for d in routes[-1][1:])
    else:
      if network.allows(tuple(routes)):
        return tuple(routes)


def _replay(network, schedule):
  """Times from the lists and the paths alone: {token: (device, start, end)}."""
  where = {str(a): d for d, row in enumerate(schedule.order) for a in row}
  needs = {}
  for m, path in enumerate(schedule.paths):
    trip = [f"{s}F{m}" for s in path] + [f"{s}B{m}" for s in path[::-1]]
    needs.update(zip(trip, [None, *trip], strict=False))
  done, heads, free = {}, [0] * schedule.devices, [0] * schedule.devices
  while len(done) < len(needs):
    moved = False
    for d, row in enumerate(schedule.order):
      while heads[d] < len(row):
        token, need = str(row[heads[d]]), needs[str(row[heads[d]])]
        if need is not None and need not in done:
          break
        hop = network.hop if need is not None and where[need] != d else 0
        start = max(free[d], done[need][2] + hop if need else 0)
        times = network.forward if row[heads[d]].kind is Kind.F else network.backward
        free[d] = start + times[d]
        done[token] = (d, start, free[d])
        heads[d] += 1
        moved = True
    assert moved
  return done


def _assert_kept(network, schedule):
  """Nobody in two places at once, nobody above its capacity, stages visited as often as allowed."""
  schedule.check()
  done = _replay(network, schedule)
  for d in range(schedule.devices):
    mine = sorted((start, end, token) for token, (at, start, end) in done.items() if at == d)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine))
    held = most = 0
    for _, _, token in mine:
      held += 1 if "F" in token else -1
      most = max(most, held)
    assert held == 0 and most <= network.capacity[d]
  assert _spread([s for path in schedule.paths for s in path], schedule.stages) <= 1
  for path in schedule.paths:
    assert len(path) == network.visits and path[0] == 0 and len(set(path)) == len(path)
    assert network.reorder or list(path) == sorted(path)
  return max(end for _, _, end in done.values())


# Where a device holds one only, microbatches that go different ways round may block each other.
@pytest.mark.parametrize("capacity, reorder", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("seed", range(4))
def test_paths_keep_clear_of_each_other_and_within_memory(seed, capacity, reorder):
  network = _network(seed, TWENTY, 10, 4, capacity=capacity, reorder=reorder)
  schedule = module.schedule_routes(network, seed=seed)
  makespan = _assert_kept(network, schedule)
  assert makespan == dispatch(network, find_routes(network, seed=seed)).makespan


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("S, k", [(3, 2), (3, 3), (4, 2), (4, 3)])
@pytest.mark.parametrize("M", [2, 3])
def test_small_cases_are_optimal(S, k, M, reorder):
  for seed in range(5):
    network = _network(seed, Placement.loop(S), M, k, reorder=reorder)
    ways = itertools.permutations if reorder else itertools.combinations
    paths = [(0, *rest) for rest in ways(range(1, S), k - 1)]
    # With one device per stage a path is a route.
    spans = [
      dispatch(network, plan).makespan
      for plan in itertools.product(paths, repeat=M)
      if _spread([s for path in plan for s in path], S) <= 1
    ]
    assert dispatch(network, find_routes(network)).makespan == min(spans)


def test_search_beyond_brute_force_comes_close_to_it():
  """Cut off from trying everything, branching on collisions finds nearly the same."""
  losses = []
  for seed in range(20):
    network = _network(seed, Placement.loop(4), 4, 3)
    best = dispatch(network, find_routes(network)).makespan
    # 81 combinations of 24 passes: just too many.
    found = dispatch(network, find_routes(network, work=80 * 24)).makespan
    assert found >= best
    losses.append(found / best - 1)
  assert statistics.mean(losses) < 0.02


def test_never_longer_than_random_skipping():
  gains = []
  for seed in range(100):
    draw = random.Random(seed)
    placement = draw.choice(
      (TWENTY, Placement.loop(6), Placement(((0,), (0,), (1,), (1,), (2,), (3,))))
    )
    k = draw.choice((3, 4)) if placement.stages > 4 else 3
    network = _network(
      seed, placement, draw.choice((6, 10, 15)), k, capacity=draw.choice((3, math.inf))
    )
    planned = dispatch(network, find_routes(network, work=20_000)).makespan
    skipped = dispatch(network, _random_routes(network, draw)).makespan
    assert planned <= skipped
    gains.append(1 - planned / skipped)
  print(f"mean gain over random skipping: {statistics.mean(gains):.1%}, least {min(gains):.1%}")
  assert statistics.mean(gains) > 0.1


def test_skipping_and_planning_shorten_the_step():
  full = module.plan_paths(TWENTY, 10, 6, memory_limit=3)
  part = module.plan_paths(TWENTY, 10, 4, memory_limit=3)
  assert simulate(part).makespan < simulate(full).makespan


@pytest.mark.sampled("P, M", GRID, 40)
def test_family_is_legal_balanced_and_within_memory(P, M):
  for limit in (None, 2):
    schedule = make_schedule("skippipe", devices=P, microbatches=M, memory_limit=limit)
    k = len(schedule.paths[0])
    assert k == math.ceil(2 * P / 3) or P < 3 or M < 3
    visited = [s for path in schedule.paths for s in path]
    assert visited.count(0) == M and len(visited) == M * k
    assert set(visited) == set(range(P)) and _spread(visited, P) <= 1
    timeline = simulate(schedule)
    assert sum(timeline.busy) == 3 * M * k
    if limit is not None:
      assert max(timeline.peak_activations) <= limit


def test_family_plans_with_costs():
  costs = Costs((1, 4, 1, 1), (1, 4, 1, 1), (1, 4, 1, 1), 1)
  sizes = {"devices": 4, "microbatches": 3, "visits": 2}
  planned = simulate(make_schedule("skippipe", **sizes, costs=costs), costs)
  blind = simulate(make_schedule("skippipe", **sizes), costs)
  assert planned.makespan <= blind.makespan


@pytest.mark.parametrize("P, M", [(64, 256), (16, 96)])
def test_large_pipelines_are_dealt_in_turn(P, M):
  schedule = make_schedule("skippipe", devices=P, microbatches=M)
  visits = collections.Counter(s for path in schedule.paths for s in path[1:])
  assert max(visits.values()) - min(visits.values()) <= 1


def test_paths_go_through_json():
  schedule = make_schedule("skippipe", devices=4, microbatches=6)
  assert from_json(to_json(simulate(schedule))) == schedule


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"visits": 5}, r"cannot visit 5 of 4 stages; use visits=4 or fewer"),
    ({"memory_limit": 0.5}, r"device 0 has memory for 0 microbatches; use a memory_limit"),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ValueError, match=message):
    make_schedule("skippipe", devices=4, microbatches=4, **changes)


def test_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match="has 1 stage per device, not 2; use chunks=1"):
    module.plan_paths(Placement.loop(2, 2), 4)
  with pytest.raises(ValueError, match="forward lists 2 devices, there are 4"):
    module.plan_paths(Placement.loop(4), 4, forward=(1, 2))
  with pytest.raises(ScheduleError, match="with cap=1; use cap=3 or more"):
    module.plan_paths(Placement.loop(4), 4, 3, cap=1)


def test_routes_that_block_each_other_are_refused():
  network = Network(
    placement=Placement.loop(3),
    microbatches=2,
    visits=3,
    cap=2,
    forward=(1, 2, 1),
    backward=(1, 1, 1),
    capacity=(2, 1, 1),
    reorder=True,
  )
  with pytest.raises(ScheduleError, match="block each other for lack of memory"):
    module.schedule_routes(network, ((0, 1, 2), (0, 2, 1)))


def test_timetable_in_the_docstring_is_the_drawn_one():
  rows = draw_text(simulate(make_schedule("skippipe", devices=4, microbatches=4))).splitlines()[1:5]
  assert "\n".join(f"  {row}" for row in rows) in module.__doc__
