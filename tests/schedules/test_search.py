"""The search against enumeration, against the solver, and against every name."""

import itertools
import random
import re

import pytest

from jaxpipe.schedules import (
  Action,
  Costs,
  Kind,
  Placement,
  Schedule,
  ScheduleError,
  draw_text,
  make_schedule,
  simulate,
)
from jaxpipe.schedules import search as search_module
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.search import named_schedules, search
from jaxpipe.schedules.solver.bounds import lower_bound
from jaxpipe.schedules.solver.problem import pose
from jaxpipe.schedules.solver.run import run

SMALL = [(seed, objective) for seed in range(200) for objective in ("makespan", "span")]
LARGE = range(200)


def _instance(seed, devices, microbatches):
  """Random per-stage times and memory, and limits from just enough to plenty."""
  draw = random.Random(seed)
  chunks = draw.choice([1, 1, 2])
  stages = devices * chunks
  place = Placement.v(devices) if chunks == 2 and draw.random() < 0.5 else None
  place = place or Placement.loop(devices, chunks)
  times = [[draw.randint(2, 12) for _ in range(stages)] for _ in "FIW"]
  held = [draw.randint(2, 6) for _ in range(stages)]
  freed = [draw.randint(0, x - 1) for x in held]
  memory = (held, [-x for x in freed], [x - y for x, y in zip(freed, held, strict=True)])
  least = [sum(held[s] for s in row) for row in place.table]
  limit = [int(x * draw.uniform(1, devices * 1.5)) for x in least]
  return {
    "placement": place,
    "microbatches": microbatches,
    "costs": Costs(*times, draw.randint(0, 3)),
    "memory": memory,
    "memory_limit": draw.choice([None, limit, limit, max(limit)]),
  }


def _search(instance, **more):
  place = instance["placement"]
  return search(devices=place.devices, chunks=place.chunks, **instance, **more)


def _value(schedule, instance, objective):
  """As the simulator has it; None above the limit."""
  timeline = simulate(schedule, instance["costs"], instance["memory"])
  limit = instance["memory_limit"]
  limits = limit if isinstance(limit, list) else [limit] * schedule.devices
  if any(x is not None and p > x for p, x in zip(timeline.peak_memory, limits, strict=True)):
    return None
  return getattr(timeline, objective)


def _lists(stage, microbatches, kinds="FIW"):
  """Every order of one stage's actions that has F before I before W, or F before B."""
  actions = [Action(stage, Kind(kind), m) for kind in kinds for m in range(microbatches)]
  for row in itertools.permutations(actions):
    at = {(a.kind, a.microbatch): i for i, a in enumerate(row)}
    pairs = itertools.pairwise(Kind(kind) for kind in kinds)
    if all(at[x, m] < at[y, m] for x, y in pairs for m in range(microbatches)):
      yield row


def _best_of_all(instance, objective, rows):
  best = None
  for order in itertools.product(*rows):
    schedule = Schedule("any", instance["placement"], instance["microbatches"], order)
    try:
      value = _value(schedule, instance, objective)
    except ScheduleError:
      continue
    if value is not None and (best is None or value < best):
      best = value
  return best


@pytest.mark.parametrize("objective", ["makespan", "span"])
@pytest.mark.sampled("seed", range(40), 2)
def test_nothing_in_any_order_of_microbatches_is_better(seed, objective):
  instance = _instance(seed, 2, 2)
  instance["placement"] = Placement.loop(2)
  instance["costs"] = Costs([3, 5], [2 + seed % 7, 4], [4, 1 + seed % 5], seed % 3)
  instance["memory"] = (2, -1, -1)
  instance["memory_limit"] = [2 + seed % 3, 2 + seed % 2]
  best = _best_of_all(instance, objective, [list(_lists(s, 2)) for s in range(2)])
  assert _search(instance, objective=objective, exact=False).value == best


@pytest.mark.parametrize("objective", ["makespan", "span"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.sampled("seed", range(60), 2)
def test_nothing_in_order_is_better_with_three_microbatches(seed, exact, objective):
  if exact:
    pytest.importorskip("ortools", reason="OR-tools are not installed: pip install jaxpipe[search]")
  draw = random.Random(seed)
  costs = Costs(*[[draw.randint(1, 9) for _ in range(2)] for _ in "FIW"], draw.randint(0, 2))
  memory = ([2, 3], [-1, -2], [-1, -1])
  limit = [draw.randint(2, 6), draw.randint(3, 9)]
  instance = {"placement": Placement.loop(2), "microbatches": 3, "costs": costs}
  instance |= {"memory": memory, "memory_limit": limit}
  problem = pose(objective=objective, **instance)
  words = [list(_words(d, 3)) for d in range(2)]
  runs = [
    here.value[0]
    for pair in itertools.product(*words)
    if (here := run(problem, [list(w) for w in pair])) is not None
    and problem.value(problem.schedule([list(w) for w in pair])) is not None
  ]
  found = _search(instance, objective=objective, exact=exact)
  assert found.value == min(runs)
  assert found.lower_bound <= found.value
  assert not exact or found.optimal


def _words(d, microbatches):
  """Ballot words of one device with one stage out of two."""
  letters = [d, 2 + d, 4 + d]

  def extend(word, count):
    if len(word) == 3 * microbatches:
      yield tuple(word)
    for k in range(3):
      if count[k] < (microbatches if k == 0 else count[k - 1]):
        yield from extend([*word, letters[k]], [c + (i == k) for i, c in enumerate(count)])

  return extend([], [0, 0, 0])


@pytest.mark.parametrize("limit", [[4, 1], [2, 3], [3, 3]], ids=str)
def test_a_backward_stays_fused_where_its_halves_do_not_fit(limit):
  pytest.importorskip("ortools", reason="OR-tools are not installed: pip install jaxpipe[search]")
  # I holds 2 more until W: halves need 3, a fused B never shows it.
  instance = {"placement": Placement.loop(2), "microbatches": 2, "costs": Costs(3, 2, 4)}
  instance |= {"memory": (1, 2, -3), "memory_limit": limit}
  mixed = []
  for d in range(2):
    split = list(_lists(d, 2))
    halves = [[(a, Action(d, Kind.W, a.microbatch)) for a in row if a.kind == "I"] for row in split]
    joined = set(split)
    for row, pairs in zip(split, halves, strict=True):
      for chosen in itertools.product([False, True], repeat=2):
        new = list(row)
        for (i, w), fuse in zip(pairs, chosen, strict=True):
          if fuse and new.index(w) == new.index(i) + 1:
            new[new.index(i) : new.index(w) + 1] = [Action(d, Kind.B, i.microbatch)]
        joined.add(tuple(new))
    mixed.append(sorted(joined, key=str))
  for objective in ("makespan", "span"):
    found = _search(instance, objective=objective, exact=True)
    assert found.optimal
    assert found.value == _best_of_all(instance, objective, mixed)
    assert any(a.kind is Kind.B for row in found.schedule.order for a in row)


@pytest.mark.sampled("seed, objective", SMALL, 6)
def test_optimal_wherever_the_solver_finishes(seed, objective):
  pytest.importorskip("ortools", reason="OR-tools are not installed: pip install jaxpipe[search]")
  draw = random.Random(seed)
  instance = _instance(seed, draw.randint(1, 4), draw.randint(1, 5))
  found = _search(instance, objective=objective)
  # From a poor start, so that the two cannot share a mistake of the local search.
  proven = _search(instance, objective=objective, exact=True, moves=0, seed=1)
  assert _value(found.schedule, instance, objective) == found.value
  assert found.lower_bound <= proven.value <= found.value or not proven.optimal
  if proven.optimal:
    assert found.value == proven.value
    assert lower_bound(pose(objective=objective, **instance)) <= proven.value


@pytest.mark.sampled("seed", LARGE, 1)
def test_never_worse_than_a_named_schedule_that_fits(seed):
  draw = random.Random(seed)
  instance = _instance(seed, draw.randint(2, 8), draw.randint(2, 32))
  found = _search(instance, moves=200)
  assert _value(found.schedule.check(), instance, "makespan") == found.value >= found.lower_bound
  rest = {k: instance[k] for k in ("costs", "memory", "memory_limit")}
  named = list(named_schedules(pose(objective="makespan", **instance), **rest))
  assert named or instance["memory_limit"]
  for schedule in named:
    assert found.value <= _value(schedule, instance, "makespan")


def test_per_stage_times_beat_every_fixed_order():
  """One slow stage: a schedule for the median stage idles there."""
  instance = {"placement": Placement.loop(4), "microbatches": 8}
  instance |= {"costs": Costs([2, 2, 7, 2], [2, 2, 6, 3], [2, 2, 2, 5], 1), "memory": (1, 0, -1)}
  instance |= {"memory_limit": [4, 3, 3, 2]}
  found = _search(instance, exact=False)
  rest = {k: instance[k] for k in ("costs", "memory", "memory_limit")}
  named = named_schedules(pose(objective="makespan", **instance), **rest)
  # zb-auto is planned for per-stage times too.
  fixed = [schedule for schedule in named if schedule.name != "zb-auto"]
  assert found.value < min(_value(schedule, instance, "makespan") for schedule in fixed)


def test_a_hop_counts_between_devices_only():
  alone = search(devices=1, chunks=2, microbatches=2, costs=Costs(1, 1, 1, 5), exact=False)
  assert alone.value == alone.lower_bound == 12
  # Down, the fold in place, up, and the same way back.
  fold = search(devices=2, chunks=2, placement="v", microbatches=1, costs=Costs(1, 1, 1, 5))
  assert fold.value == fold.lower_bound == 4 + 4 + 1 + 4 * 5


def test_the_same_question_has_the_same_answer():
  instance = _instance(9, 5, 21)
  assert _search(instance, moves=900) == _search(instance, moves=900)


def test_a_schedule_that_skips_work_is_no_match(monkeypatch):
  skips = Schedule.from_tokens([["0F0", "0B0"], ["1F1", "1B1"]], paths=[[0], [1]])
  monkeypatch.setattr(search_module, "FAMILIES", {"skips": FAMILIES["skippipe"]})
  monkeypatch.setattr(search_module, "make_schedule", lambda name, **spec: skips)
  assert search(devices=2, microbatches=2, exact=False).value == 7


def test_decimals_are_exact():
  found = search(devices=2, microbatches=3, costs=Costs(0.1, 0.2, 0.3, 0.7), memory_limit=2)
  whole = search(devices=2, microbatches=3, costs=Costs(1, 2, 3, 7), memory_limit=2)
  assert (found.value, whole.value) == (4.6, 46)


def test_a_limit_below_one_microbatch_says_what_is_needed():
  with pytest.raises(ValueError, match=r"holds 2 on device 0, above its memory_limit of 1\.5"):
    search(devices=2, microbatches=2, chunks=2, memory_limit=[1.5, 9])


@pytest.mark.parametrize(
  "more, message",
  [
    ({"objective": "speed"}, "unknown objective 'speed'"),
    ({"memory_limit": [1, 2, 3]}, "memory_limit lists 3 devices, there are 2"),
    ({"costs": Costs([1, 2, 3])}, "forward lists 3 stages"),
    ({"placement": Placement.loop(3)}, "the placement has 3 devices"),
    ({"placement": "mirrored"}, "the placement has 2 devices of 2 chunks, not 2 of 1"),
    ({"placement": Placement.mirrored(2), "chunks": 2}, "holds stages twice"),
    ({"costs": Costs(hop=1, hop_occupies_link=True)}, "hop_occupies_link=False"),
    ({"microbatches": 0}, "use microbatches=1 or more"),
  ],
)
def test_what_cannot_be_searched_is_refused(more, message):
  with pytest.raises(ValueError, match=message):
    search(**{"devices": 2, "microbatches": 2} | more)


def test_without_or_tools_the_remedy_is_named(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "ortools", None)
  monkeypatch.setitem(__import__("sys").modules, "ortools.sat.python", None)
  with pytest.raises(ImportError, match=r"pip install jaxpipe\[search\]"):
    search(devices=2, microbatches=2, exact=True)


def test_timetable_in_the_docstring_is_as_good_as_the_one_found():
  """Not the same one: as names are added, another of the best may come first."""
  costs = Costs([2, 1, 1], [1, 2, 1], [1, 1, 2])
  found = search(devices=3, microbatches=4, costs=costs, memory_limit=[3, 2, 2], exact=False)
  assert found.value == found.lower_bound == 19
  split = make_schedule("1f1b", devices=3, microbatches=4, backward="split")
  assert simulate(split, costs).makespan == 21
  rows = re.findall(r"^  device \d \| .*", search_module.__doc__, re.MULTILINE)
  tokens = [[f"{d}{x}" for x in re.findall(r"[FIW]\d", row)] for d, row in enumerate(rows)]
  timeline = simulate(Schedule.from_tokens(tokens), costs)
  assert (timeline.makespan, timeline.peak_memory) == (19, (3, 2, 2))
  assert [f"  {row}" for row in draw_text(timeline).splitlines()[1:4]] == rows
