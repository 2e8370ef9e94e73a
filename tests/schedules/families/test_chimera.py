"""Chimera: the paper's bubble and memory at equal passes."""

import pytest
from timetables import documented_rows, drawn_rows

from jaxpipe.schedules import Costs, ScheduleError, make_schedule, simulate
from jaxpipe.schedules.families import chimera

# A fused backward that takes as long as a forward.
EQUAL = Costs(2, 1, 1)


def _make(P, M, **options):
  return make_schedule("chimera", devices=P, microbatches=M, **options)


def test_literal_timetable():
  schedule = _make(4, 4)
  assert [" ".join(row) for row in schedule.tokens()] == [
    "0F0 0F2 3F1 3B1 3F3 3B3 0B0 0B2",
    "1F0 2F1 1F2 2F3 2B1 1B0 2B3 1B2",
    "1F1 2F0 1F3 2F2 2B0 1B1 2B2 1B3",
    "0F1 0F3 3F0 3B0 3F2 3B2 0B1 0B3",
  ]
  assert documented_rows(chimera) == drawn_rows(simulate(schedule, EQUAL))


@pytest.mark.parametrize("P", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("units", [1, 2, 3, 7])
def test_bubble_and_peak_of_the_paper(P, units):
  M = units * P
  timeline = simulate(_make(P, M), EQUAL)
  assert timeline.makespan == 2 * (2 * M + P - 2)
  assert timeline.bubble == pytest.approx((P - 2) / (2 * M + P - 2), abs=1e-12)
  assert min(timeline.peak_activations) == P // 2 + 1
  assert max(timeline.peak_activations) == P
  # With a backward of two forwards: 2P-4 for one unit, P-2 for every further one.
  assert simulate(_make(P, M)).makespan == 3 * M + (units + 1) * (P - 2)


@pytest.mark.parametrize("P", [2, 4, 6, 8])
@pytest.mark.parametrize("backward", ["fused", "split", "deferred"])
def test_legal_for_all_sizes(P, backward):
  for M in range(1, 25):
    schedule = _make(P, M, backward=backward, costs=Costs(3, 4, 2, 1))
    down = {a.microbatch for a in schedule.order[0] if a.stage == 0}
    assert len(down) == (M + 1) // 2
    assert max(simulate(_make(P, M)).peak_activations) <= P


@pytest.mark.parametrize("P", [1, 3])
def test_odd_devices_are_refused(P):
  with pytest.raises(ScheduleError, match=f"not {P} devices .* use devices={P + 1}"):
    _make(P, 4)
