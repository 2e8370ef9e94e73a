"""ZeroPP: gathers, bubbles against breadth-first, memory, and blocks in units."""

import itertools
import math

import pytest

from jaxpipe.schedules import Costs, Kind, Placement, draw_text, make_schedule, simulate
from jaxpipe.schedules.families import zeropp as module

GRID = [(P, M, V) for P in range(1, 9) for M in range(1, 25) for V in range(1, 5)]
COSTS = [Costs(), Costs(5, 6, 4), Costs(5, 6, 4, 3), Costs(1, 2, 1, 1)]


def _make(P, M, V, costs=None, **options):
  return make_schedule("zeropp", devices=P, microbatches=M, chunks=V, costs=costs, **options)


def _breadth_first(P, M, V, costs):
  """Looped BFS by its definition: forwards chunk by chunk, then fused backwards."""
  times = {"F": costs.forward, "B": costs.input_grad + costs.weight_grad}
  free, made, hop = [0] * P, {}, costs.hop if P > 1 else 0
  begins = [None] * P
  for kind, stages in (("F", range(P * V)), ("B", range(P * V)[::-1])):
    for s, m in itertools.product(stages, range(M)):
      before = made.get((kind, s + (1 if kind == "B" else -1), m), -hop) + hop
      start = max(free[s % P], before)
      begins[s % P] = start if begins[s % P] is None else begins[s % P]
      free[s % P] = made[kind, s, m] = start + times[kind]
  return max(free), max(end - begin for end, begin in zip(free, begins, strict=True))


def _units(schedule):
  return sorted({a.microbatch for a in schedule.order[0] if a.kind is Kind.G})


@pytest.mark.sampled("P, M, V", GRID, 60)
def test_never_longer_than_breadth_first(P, M, V):
  for costs in COSTS:
    timeline = simulate(_make(P, M, V, costs), costs)
    makespan, span = _breadth_first(P, M, V, costs)
    assert timeline.makespan <= makespan
    assert timeline.span <= span
    if M >= P and costs.hop == 0:
      assert timeline.bubble <= (P - 1) / (V * M + P - 1) + 1e-12


@pytest.mark.sampled("P, M, V", GRID, 40)
def test_holds_less_than_breadth_first_where_there_are_several_units(P, M, V):
  for costs in COSTS:
    schedule = _make(P, M, V, costs)
    units, peak = _units(schedule), max(simulate(schedule).peak_activations)
    if len(units) > 1:
      U = units[1]
      assert V * U <= peak < min(V * M, 2 * V * U)


@pytest.mark.sampled("P, M, V", GRID, 30)
@pytest.mark.parametrize("U", [1, 3, 8, 30])
def test_gathers_twice_per_chunk_and_unit(P, M, V, U):
  schedule = _make(P, M, V, unit=U)
  assert _units(schedule) == list(range(0, M, U))
  peak = max(simulate(schedule).peak_activations)
  assert peak <= max(V * min(U, M), 2 * V * U - 1)
  if U < M:
    assert peak < V * M
  for row in schedule.order:
    kinds = [a.kind for a in row]
    assert kinds.count(Kind.G) == kinds.count(Kind.X) == 2 * V * math.ceil(M / U)


@pytest.mark.sampled("P, M, V", GRID, 30)
def test_blocks_are_whole(P, M, V):
  """Between a gather and its release stands one kind of pass of one chunk over one unit."""
  U = 4
  schedule = _make(P, M, V, unit=U)
  for d, row in enumerate(schedule.order):
    text = " ".join(str(a) for a in row if a.kind is not Kind.W)
    chunks = schedule.placement.table[d]
    blocks = [
      (s, kind, range(begin, min(begin + U, M)))
      for begin in range(0, M, U)
      for kind, stages in (("F", chunks), ("I", chunks[::-1]))
      for s in stages
    ]
    assert text == " ".join(
      f"{s}G{unit[0]} {' '.join(f'{s}{kind}{m}' for m in unit)} {s}X{unit[0]}"
      for s, kind, unit in blocks
    )


@pytest.mark.parametrize("P, M, V", [(4, 32, 2), (8, 64, 2), (2, 24, 1), (8, 128, 4)])
def test_only_the_first_trip_is_paid(P, M, V):
  schedule = _make(P, M, V)
  timeline = simulate(schedule)
  assert len(_units(schedule)) > 1
  assert timeline.makespan == 3 * M * V + 2 * (P - 1)
  assert timeline.makespan == simulate(_make(P, M, V, unit=M)).makespan


@pytest.mark.sampled("P, M, V", GRID, 20)
def test_uneven_stages_are_hardly_longer_than_breadth_first(P, M, V):
  """Only a W that overruns a gap can cost anything."""
  S = P * V
  forward = [1 + s % 3 for s in range(S)]
  costs = Costs(forward, forward, forward)
  schedule = _make(P, M, V, costs)
  assert schedule.placement == Placement.loop(P, V)
  assert simulate(schedule, costs).makespan <= 1.1 * module._breadth_first_time(
    module.Spec(devices=P, microbatches=M, chunks=V, costs=costs)
  )


def test_plans_grow_linearly():
  schedule = _make(16, 512, 2)
  assert sum(map(len, schedule.order)) == 3 * 16 * 512 * 2 + 4 * 2 * 16 * len(_units(schedule))


def test_timetable_in_the_docstring_is_the_drawn_one():
  drawn = draw_text(simulate(_make(2, 4, 2, unit=2)), width=86).splitlines()[1:-1]
  assert "\n".join(f"  {row}".rstrip() for row in drawn) in module.__doc__
