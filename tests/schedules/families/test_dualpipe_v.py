"""DualPipeV: PyTorch's orders and times, DeepSeek's formula."""

import json
import pathlib

import pytest
from timetables import documented_rows, drawn_rows

from jaxpipe.schedules import Costs, Overlap, Schedule, make_schedule, simulate
from jaxpipe.schedules.families import dualpipe_v

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[2] / "golden" / "pytorch_dualpipev.json").read_text()
)
# Equal forwards and input gradients, and pairs of at least two forwards.
EQUAL = [Costs(), Costs(2, 2, 1), Costs(3, 3, 1), Costs(3, 3, 2, overlap=0.75)]


def _make(P, M, **options):
  return make_schedule("dualpipe-v", devices=P, microbatches=M, **options)


def test_literal_timetable():
  schedule = _make(1, 3)
  assert [" ".join(row) for row in schedule.tokens()] == [
    "0F0 1F0 0F1 1B0 (1F1;0B0)OVERLAP_F_B (0F2;1B1)OVERLAP_F_B (1F2;0B1)OVERLAP_F_B 1B2 0I2 0W2"
  ]
  assert documented_rows(dualpipe_v) == drawn_rows(simulate(_make(2, 4)), 87)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['P']}-{case['M']}")
def test_order_and_times_of_pytorch(case):
  schedule = _make(case["P"], case["M"])
  assert [" ".join(row) for row in schedule.tokens()] == case["order"]
  in_turn = Schedule.from_tokens(
    [[str(part) for step in row for part in step.parts] for row in schedule.order], "v"
  )
  for name, model in GOLDEN["cost_models"].items():
    cost = model["cost"]
    costs = Costs(cost["F"], cost["I"], cost["W"], model["comm"])
    for ours, key in ((schedule, f"{name}_atomic"), (in_turn, name)):
      timeline = simulate(ours, costs)
      assert timeline.makespan == case["metrics"][key]["makespan"]
      assert timeline.span == case["metrics"][key]["zb_span"]
      assert timeline.peak_activations == tuple(case["peak_act_until_W"])


@pytest.mark.parametrize("P", range(1, 9))
@pytest.mark.parametrize("costs", EQUAL)
def test_idle_time_is_the_formula(P, costs):
  F, I, W = costs.forward, costs.input_grad, costs.weight_grad
  pair, B = costs.overlap * (F + I + W), I + W
  for M in (2 * P, 2 * P + 1, 3 * P + 1):
    timeline = simulate(_make(P, M), costs)
    assert timeline.makespan - timeline.busy[-1] == pytest.approx((P - 1) * (pair + B - 3 * W))
    assert max(timeline.peak_activations) == 2 * P + 1


@pytest.mark.parametrize("P", range(1, 9))
@pytest.mark.parametrize("costs", [Costs(), Costs(3, 4, 2, 1), Costs(2, 1, 1, overlap=0.5)])
def test_legal_for_all_sizes(P, costs):
  for M in range(1, 25):
    schedule = _make(P, M, costs=costs)
    assert max(simulate(schedule).peak_activations) <= min(2 * P + 1, 2 * M)
    paired = any(isinstance(step, Overlap) for row in schedule.order for step in row)
    assert paired or M < 2 * P
