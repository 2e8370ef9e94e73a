"""BitPipe: its formula for M = P, bounded idle time and memory beyond."""

import pytest
from timetables import documented_rows, drawn_rows

from jaxpipe.schedules import Costs, ScheduleError, make_schedule, simulate
from jaxpipe.schedules.families import bitpipe


def _make(P, M, **options):
  return make_schedule("bitpipe", devices=P, microbatches=M, **options)


def test_literal_timetable():
  schedule = _make(2, 2)
  assert [" ".join(row) for row in schedule.tokens()] == [
    "0F0 1F1 2F1 3F0 3B0 2B1 1B1 0B0",
    "0F1 1F0 2F0 3F1 3B1 2B0 1B0 0B1",
  ]
  assert documented_rows(bitpipe) == drawn_rows(simulate(schedule))


@pytest.mark.parametrize("P", [2, 4, 6, 8, 10, 16])
def test_bubble_and_peak_of_one_unit(P):
  timeline = simulate(_make(P, P))
  assert timeline.makespan == 8 * P - 4
  assert timeline.bubble == pytest.approx((P - 2) / (3 * P + P - 2), abs=1e-12)
  # Two chunks per microbatch.
  assert min(timeline.peak_activations) >= (3 * P + 2) // 2
  assert max(timeline.peak_activations) == 2 * P


@pytest.mark.parametrize(
  "P, idle, chunks", [(2, 0, 4), (4, 4, 9), (6, 9, 15), (8, 16, 22), (16, 35, 45)]
)
@pytest.mark.parametrize("rounds", [2, 3, 8])
def test_neither_idle_time_nor_memory_grows(P, idle, chunks, rounds):
  M = rounds * P
  timeline = simulate(_make(P, M))
  assert timeline.makespan - 6 * M <= idle
  assert max(timeline.peak_activations) <= chunks


@pytest.mark.parametrize("P", [2, 4, 6, 8])
@pytest.mark.parametrize("costs", [Costs(), Costs(3, 4, 2, 1), Costs(0, 0, 0), Costs(1, 0, 5, 7)])
def test_legal_for_all_sizes_and_costs(P, costs):
  for M in range(1, 25):
    schedule = _make(P, M, costs=costs)
    down = {a.microbatch for a in schedule.order[0] if a.stage in (0, 2 * P - 1)}
    assert len(down) == (M + 1) // 2


def test_memory_limit_is_planned_for():
  assert max(simulate(_make(4, 16)).peak_activations) == 9
  assert max(simulate(_make(4, 16, memory_limit=8)).peak_activations) <= 8


@pytest.mark.parametrize("P", [1, 3])
def test_odd_devices_are_refused(P):
  with pytest.raises(ScheduleError, match=f"not {P} devices .* use devices={P + 1}"):
    _make(P, 4)
