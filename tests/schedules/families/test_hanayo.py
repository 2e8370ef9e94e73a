"""Hanayo: bubbles below the paper's formula, memory that does not grow, any sizes."""

from fractions import Fraction

import pytest
from timetables import documented_rows, drawn_rows

from jaxpipe.schedules import Costs, Placement, Schedule, make_schedule, simulate
from jaxpipe.schedules.families import hanayo
from jaxpipe.schedules.planning import fused_list
from jaxpipe.schedules.planning.list_schedule import all_work
from jaxpipe.schedules.spec import Spec


def _make(P, M, **options):
  return make_schedule("hanayo", devices=P, microbatches=M, **options)


def test_literal_timetable():
  schedule = _make(2, 2)
  assert [" ".join(row) for row in schedule.tokens()] == [
    "0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1",
    "1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1",
  ]
  assert documented_rows(hanayo) == drawn_rows(simulate(schedule))


def test_the_planners_timetable():
  placement = Placement.loop(2)
  order = fused_list.fused_list_schedule(
    placement, all_work(placement, 3), Spec(devices=2, microbatches=3), lambda kind, stage, m: m
  )
  timeline = simulate(Schedule("fused", placement, 3, order).check())
  assert documented_rows(fused_list) == drawn_rows(timeline)


@pytest.mark.parametrize("P", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_at_most_the_papers_bubble(P, W):
  timeline = simulate(_make(P, P, waves=W))
  assert timeline.bubble <= (2 * P - 2) / (3 * P * W + P - 1)
  # Ours: the last microbatch follows the first as closely as can be.
  assert timeline.makespan == 6 * P * W + 4 * (P - 1)
  assert Fraction(timeline.bubble).limit_denominator(1000) == Fraction(
    2 * P - 2, 3 * P * W + 2 * P - 2
  )
  assert max(timeline.peak_activations) == 2 * P * W


@pytest.mark.parametrize(
  "P, V, idle, chunks", [(2, 2, 3, 7), (4, 2, 9, 11), (4, 4, 9, 22), (8, 2, 23, 21), (8, 4, 24, 42)]
)
@pytest.mark.parametrize("rounds", [2, 3, 8])
def test_neither_idle_time_nor_memory_grows(P, V, idle, chunks, rounds):
  M = rounds * P
  timeline = simulate(_make(P, M, chunks=V))
  assert timeline.makespan - 3 * V * M <= idle
  assert max(timeline.peak_activations) <= chunks


@pytest.mark.parametrize("P", range(1, 9))
@pytest.mark.parametrize("costs", [Costs(), Costs(3, 4, 2, 1), Costs(0, 0, 0), Costs(1, 0, 5, 7)])
def test_legal_for_all_sizes_and_costs(P, costs):
  for M in range(1, 25):
    schedule = _make(P, M, chunks=2 + 2 * (M % 3), costs=costs)
    assert schedule.placement.name == "wave"


def test_uneven_stages():
  _make(3, 7, costs=Costs([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], 1))


def test_memory_limit_is_planned_for():
  assert max(simulate(_make(4, 16)).peak_activations) == 11
  timeline = simulate(_make(4, 16, memory_limit=6))
  assert max(timeline.peak_activations) <= 6
  with pytest.raises(ValueError, match="memory_limit=1"):
    _make(4, 16, memory_limit=1)


def test_waves_and_chunks():
  assert _make(4, 4, waves=2).chunks == _make(4, 4, chunks=4).chunks == 4
  assert _make(4, 4, waves=2, chunks=4) == _make(4, 4, chunks=4)
  with pytest.raises(ValueError, match="waves=2 needs 4 chunks per device, not 6; use chunks=4"):
    _make(4, 4, waves=2, chunks=6)
  with pytest.raises(ValueError, match="not 3 in all; use chunks=4"):
    _make(4, 4, chunks=3)
