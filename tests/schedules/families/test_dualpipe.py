"""DualPipe: DualPipeV on both halves."""

import pytest
from timetables import documented_rows, drawn_rows

from jaxpipe.schedules import Costs, Overlap, ScheduleError, make_schedule, simulate
from jaxpipe.schedules.families import dualpipe

EQUAL = [Costs(), Costs(2, 2, 1), Costs(3, 3, 2, overlap=0.75)]


def _make(P, M, **options):
  return make_schedule("dualpipe", devices=P, microbatches=M, **options)


def test_literal_timetable():
  schedule = _make(2, 4)
  assert [" ".join(row) for row in schedule.tokens()] == [
    "0F0 1F1 0F2 1B1 (1F3;0B0)OVERLAP_F_B 1B3 0I2 0W2",
    "0F1 1F0 0F3 1B0 (1F2;0B1)OVERLAP_F_B 1B2 0I3 0W3",
  ]
  assert documented_rows(dualpipe) == drawn_rows(simulate(_make(4, 8)), 87)


@pytest.mark.parametrize("P", [2, 4, 6, 8, 12])
@pytest.mark.parametrize("costs", EQUAL)
def test_idle_time_is_the_formula(P, costs):
  F, I, W = costs.forward, costs.input_grad, costs.weight_grad
  pair, B = costs.overlap * (F + I + W), I + W
  for M in (2 * P, 2 * P + 2, 4 * P):
    timeline = simulate(_make(P, M), costs)
    idle = timeline.makespan - timeline.busy[P // 2]
    assert idle == pytest.approx((P // 2 - 1) * (pair + B - 3 * W))
    assert timeline.peak_activations == (P + 1,) * P


@pytest.mark.parametrize("P, M", [(2, 4), (4, 8), (6, 14), (8, 24)])
def test_twice_dualpipe_v(P, M):
  """Each half of the devices has the times of DualPipeV with half of the microbatches."""
  timeline = simulate(_make(P, M))
  half = simulate(make_schedule("dualpipe-v", devices=P // 2, microbatches=M // 2))
  assert timeline.start == half.start + half.start[::-1]


@pytest.mark.parametrize("P", [2, 4, 6, 8])
@pytest.mark.parametrize("costs", [Costs(), Costs(3, 4, 2, 1)])
def test_legal_for_all_sizes(P, costs):
  for M in range(1, 25):
    schedule = _make(P, M, costs=costs)
    assert max(simulate(schedule).peak_activations) <= P + 1
    down = {a.microbatch for step in schedule.order[0] for a in step.parts if a.stage == 0}
    assert len(down) == (M + 1) // 2
    paired = any(isinstance(step, Overlap) for row in schedule.order for step in row)
    assert paired or M < 2 * P


@pytest.mark.parametrize("P", [1, 3])
def test_odd_devices_are_refused(P):
  with pytest.raises(ScheduleError, match=f"not {P} devices .* use devices={P + 1}"):
    _make(P, 4)
