"""Times and peaks, by hand and against PyTorch's orders under an independent simulation."""

import json
import pathlib

import pytest

from jaxpipe.schedules import Costs, Schedule, make_schedule, simulate

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / "golden" / "pytorch_orders.json").read_text()
)


@pytest.mark.parametrize("model", GOLDEN["cost_models"])
@pytest.mark.parametrize(
  "case", GOLDEN["cases"], ids=lambda c: f"{c['schedule']}-{c['P']}-{c['M']}-{c['V']}"
)
def test_any_order_has_the_golden_metrics(case, model):
  """Loop and V placements, fused and split, read as text."""
  schedule = Schedule.from_tokens([row.split() for row in case["order"]], "rows")
  cost = GOLDEN["cost_models"][model]
  cost, hop = cost["cost"], cost["comm"]
  timeline = simulate(schedule, Costs(cost["F"], cost["I"], cost["W"], hop))
  golden = case["metrics"][model]
  found = (timeline.makespan, list(timeline.busy), timeline.span)
  assert found == (golden["makespan"], golden["busy"], golden["zb_span"])
  assert timeline.bubble == pytest.approx(golden["bubble_fraction"], abs=1e-9)
  assert timeline.span_bubble == pytest.approx(golden["zb_bubble_rate"], abs=1e-9)
  assert list(timeline.peak_activations) == case["peak_act_until_W"]
  assert list(timeline.peak_pending_weight_grads) == case["peak_pending_W"]


def test_makespan_and_span_differ_where_no_device_works_from_end_to_end():
  schedule = Schedule.from_tokens([["0F0", "0I0", "0W0"], ["1F0", "1I0", "1W0"]])
  timeline = simulate(schedule, Costs(1, 1, 9, 0))
  # device 0: F 0-1, I 3-4, W 4-13; device 1: F 1-2, I 2-3, W 3-12
  assert timeline.start == ((0, 3, 4), (1, 2, 3))
  assert timeline.end == ((1, 4, 13), (2, 3, 12))
  assert (timeline.makespan, timeline.span) == (13, 13)
  late = simulate(Schedule.from_tokens([["0F0", "0B0"], ["1F0", "1I0", "1W0"]]), Costs(1, 1, 9, 0))
  assert (late.makespan, late.span, late.busy) == (13, 13, (11, 11))
  # Costs by stage that make device 1 end last: it starts late, and its span is shorter.
  uneven = simulate(schedule, Costs(1, 1, (1, 9), 0))
  assert (uneven.makespan, uneven.span) == (12, 11)
  assert uneven.span_bubble == 0
  assert uneven.bubble == pytest.approx((24 - 14) / 24)


def test_a_hop_delays_the_receiver_and_occupies_nobody():
  schedule = make_schedule("gpipe", devices=2, microbatches=2)
  timeline = simulate(schedule, Costs(1, 1, 1, 10))
  assert timeline.start == ((0, 1, 25, 27), (11, 12, 13, 15))
  assert timeline.busy == (6, 6)


def test_no_hop_inside_a_device():
  rows = [["0F0", "3F0", "3B0", "0B0"], ["1F0", "2F0", "2B0", "1B0"]]
  assert simulate(Schedule.from_tokens(rows, "v"), Costs(1, 1, 1, 100)).makespan == 12 + 4 * 100


def test_costs_by_stage():
  schedule = make_schedule("gpipe", devices=2, microbatches=1)
  timeline = simulate(schedule, Costs([1, 2], (3, 4), [5, 6], 0))
  assert timeline.busy == (1 + 3 + 5, 2 + 4 + 6)
  assert timeline.makespan == 1 + 2 + 10 + 8


def test_memory_by_kind_and_stage():
  split = make_schedule("gpipe", devices=2, microbatches=3, backward="split")
  timeline = simulate(split, memory=((1, 2), 0.5, (-1.5, -2.5)))
  assert timeline.peak_memory == (3.5, 6.5)
  assert timeline.peak_activations == (3, 3)
  assert timeline.peak_pending_weight_grads == (1, 1)
  # Fused, the two changes come at once.
  fused = make_schedule("gpipe", devices=2, microbatches=3)
  assert simulate(fused, memory=((1, 2), 0.5, (-1.5, -2.5))).peak_memory == (3, 6)


def test_nothing_takes_no_time():
  timeline = simulate(make_schedule("gpipe", devices=2, microbatches=2), Costs(0, 0, 0, 0))
  assert (timeline.makespan, timeline.bubble, timeline.span_bubble) == (0, 0, 0)


@pytest.mark.parametrize(
  "costs, memory, message",
  [
    ({"forward": [1, 2, 3]}, (1, 0, -1), "forward lists 3 stages, the schedule has 2; give one"),
    ({}, (1, [0], -1), "memory of I lists 1 stages, the schedule has 2"),
    ({"hop": -1}, (1, 0, -1), "hop=-1 is no duration; use 0 or more"),
    ({"input_grad": (1, float("nan"))}, (1, 0, -1), "input_grad=nan is no duration"),
  ],
)
def test_refusals(costs, memory, message):
  with pytest.raises(ValueError, match=message):
    simulate(make_schedule("1f1b", devices=2, microbatches=2), Costs(**costs), memory)


def test_work_grows_with_the_number_of_actions_only():
  """Counted, not timed: the walk looks at each action once, however long it sleeps."""
  from jaxpipe.schedules.walk import walk

  for P, M in ((2, 64), (64, 2)):
    schedule = make_schedule("gpipe", devices=P, microbatches=M)
    assert sum(1 for _ in walk(schedule)) == 2 * P * M
