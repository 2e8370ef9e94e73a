"""Each family against its timetable, its formulas and the orders of PyTorch."""

import json
import pathlib

import pytest

from jaxpipe.schedules import Costs, Kind, draw_text, make_schedule, simulate
from jaxpipe.schedules.families import gpipe as gpipe_module
from jaxpipe.schedules.families import one_f_one_b as one_f_one_b_module

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[2] / "golden" / "pytorch_orders.json").read_text()
)
NAMES = {"GPipe": "gpipe", "1F1B": "1f1b"}
CASES = [case for case in GOLDEN["cases"] if case["schedule"] in NAMES]
SIZES = [(P, M) for P in range(1, 9) for M in range(1, 25)]

STAIRCASES = {
  "gpipe": """
    0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
    1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3
    2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3
  """,
  "1f1b": """
    0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
    1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
    2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
  """,
}


def _build(case):
  return make_schedule(NAMES[case["schedule"]], devices=case["P"], microbatches=case["M"])


def _title(case):
  return f"{case['schedule']}-{case['P']}-{case['M']}"


@pytest.mark.parametrize("name", STAIRCASES)
def test_staircase(name):
  rows = [line.split() for line in STAIRCASES[name].strip().splitlines()]
  assert make_schedule(name, devices=3, microbatches=4).tokens() == rows


def test_1f1b_with_fewer_microbatches_than_devices_is_gpipe_but_for_the_last_devices():
  assert make_schedule("1f1b", devices=4, microbatches=2).tokens() == [
    ["0F0", "0F1", "0B0", "0B1"],
    ["1F0", "1F1", "1B0", "1B1"],
    ["2F0", "2F1", "2B0", "2B1"],
    ["3F0", "3B0", "3F1", "3B1"],
  ]


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_order_is_pytorchs(case):
  assert _build(case).tokens() == [row.split() for row in case["order"]]


@pytest.mark.parametrize("model", GOLDEN["cost_models"])
@pytest.mark.parametrize("case", CASES, ids=_title)
def test_times_and_peaks_are_pytorchs(case, model):
  cost = GOLDEN["cost_models"][model]
  cost, hop = cost["cost"], cost["comm"]
  # One fused backward costs as much as its halves in all four models, so either cut must agree.
  timeline = simulate(_build(case), Costs(cost["F"], cost["I"], cost["W"], hop))
  golden = case["metrics"][model]
  assert timeline.makespan == golden["makespan"]
  assert list(timeline.busy) == golden["busy"]
  assert timeline.span == golden["zb_span"]
  assert timeline.bubble == pytest.approx(golden["bubble_fraction"], abs=1e-9)
  assert timeline.span_bubble == pytest.approx(golden["zb_bubble_rate"], abs=1e-9)
  assert list(timeline.peak_activations) == case["peak_act_until_W"]
  assert list(timeline.peak_pending_weight_grads) == case["peak_pending_W"]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.sampled("P, M", SIZES, 24)
def test_bubble_is_the_papers(name, P, M):
  timeline = simulate(make_schedule(name, devices=P, microbatches=M), Costs(7, 8, 6, 0))
  assert timeline.makespan == (M + P - 1) * 21
  assert timeline.bubble == pytest.approx((P - 1) / (M + P - 1), abs=1e-12)


@pytest.mark.sampled("P, M", SIZES, 24)
def test_gpipe_holds_every_microbatch(P, M):
  assert simulate(make_schedule("gpipe", devices=P, microbatches=M)).peak_activations == (M,) * P


@pytest.mark.sampled("P, M", SIZES, 24)
def test_1f1b_holds_what_is_on_its_way_to_the_last_device_and_back(P, M):
  timeline = simulate(make_schedule("1f1b", devices=P, microbatches=M))
  assert timeline.peak_activations == tuple(min(P - d, M) for d in range(P))


@pytest.mark.parametrize(
  "name, module", [("gpipe", gpipe_module), ("1f1b", one_f_one_b_module)], ids=["gpipe", "1f1b"]
)
def test_timetable_in_the_docstring_is_the_drawn_one(name, module):
  rows = draw_text(simulate(make_schedule(name, devices=3, microbatches=4))).splitlines()[1:4]
  assert "\n".join(f"  {row}" for row in rows) in module.__doc__


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_splitting_puts_each_weight_gradient_right_after_its_input_gradient(name):
  fused = make_schedule(name, devices=3, microbatches=5)
  split = make_schedule(name, devices=3, microbatches=5, backward="split")
  assert any(a.kind is Kind.B for row in fused.order for a in row)
  joined = [" ".join(row) for row in split.tokens()]
  for d in range(3):
    for m in range(5):
      joined[d] = joined[d].replace(f"{d}I{m} {d}W{m}", f"{d}B{m}")
  assert [row.split() for row in joined] == fused.tokens()
