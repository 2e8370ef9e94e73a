"""ZB-H1 and ZB-H2 against the paper's figure, table and formulas, and PyTorch's schedules."""

import json
import pathlib

import pytest

from jaxpipe.schedules import Costs, draw_text, make_schedule, simulate
from jaxpipe.schedules.families import zero_bubble

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
PYTORCH = json.loads((GOLDEN / "pytorch_loop_orders.json").read_text())
CASES = [c for c in PYTORCH["cases"] if c["schedule"] == "InterleavedZeroBubble"]
PAPER = json.loads((GOLDEN / "zero_bubble.json").read_text())


def _make(name, P, M, V=None):
  return make_schedule(name, devices=P, microbatches=M, chunks=V)


@pytest.mark.parametrize("name", PAPER["figure3"])
def test_figure_3(name):
  rows = [[a.microbatch + 1 for a in row] for row in _make(name, 4, 8).order]
  # The figure tells kinds apart by colour; each microbatch's three passes come in order F, I, W.
  assert rows == [
    [int(cell) for cell in row.split() if cell != "."] for row in PAPER["figure3"][name]
  ]


@pytest.mark.parametrize("row", PAPER["table5"], ids=lambda row: f"{row['model']}-{row['m']}")
@pytest.mark.parametrize("name, column", [("1f1b", "1F1B"), ("zb-h1", "ZB-H1"), ("zb-h2", "ZB-H2")])
def test_table_5(row, name, column):
  costs = Costs(row["TF"], row["TB"], row["TW"], row["Tcomm"])
  timeline = simulate(_make(name, row["p"], row["m"]), costs)
  assert round(timeline.span_bubble, 4) == row["bubble"][column]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"P{c['P']}M{c['M']}V{c['V']}")
def test_order_is_pytorchs(case):
  schedule = _make("zb-h1", case["P"], case["M"], case["V"])
  assert schedule.tokens() == [row.split() for row in case["order"]]
  for model, golden in case["metrics"].items():
    cost = PYTORCH["cost_models"][model]
    times = cost["cost"]
    timeline = simulate(schedule, Costs(times["F"], times["I"], times["W"], cost["comm"]))
    assert (timeline.makespan, timeline.span) == (golden["makespan"], golden["zb_span"])
    assert list(timeline.peak_activations) == case["peak_act_until_W"]
    assert list(timeline.peak_pending_weight_grads) == case["peak_pending_W"]


@pytest.mark.parametrize("P", range(1, 9))
def test_every_size_is_legal(P):
  for M in range(1, 25):
    _make("zb-h2", P, M)
    for V in range(1, 5):
      _make("zb-h1", P, M, V)


@pytest.mark.parametrize("P", range(1, 9))
@pytest.mark.parametrize("name, depth", [("zb-h1", 1), ("zb-h2", 2)])
def test_bubble_and_memory_are_the_papers(name, depth, P):
  for M in range(2 * P - 1, 25, 3):
    schedule = _make(name, P, M)
    assert max(simulate(schedule).peak_activations) == depth * (P - 1) + 1
    for F, I, W in ((1, 1, 1), (10, 12, 8), (2, 1, 1), (3, 3, 1)):
      timeline = simulate(schedule, Costs(F, I, W))
      assert timeline.span - max(timeline.busy) == (P - 1) * (F + I - depth * W)


def test_memory_by_device():
  """Of M_B units a microbatch keeps M_W from its I to its W: (P-i) M_B + i M_W on device i."""
  P, B, W = 6, 100, 37
  peaks = simulate(_make("zb-h1", P, 24), memory=(B, W - B, -W)).peak_memory
  assert peaks == tuple((P - d) * B + d * W for d in range(P))


def test_a_weight_gradient_cannot_be_placed_twice():
  for backward in ("fused", "deferred"):
    with pytest.raises(ValueError, match=r'places weight gradients on its own.*backward="split"'):
      make_schedule("zb-h1", devices=4, microbatches=8, backward=backward)
  plain = _make("zb-h2", 4, 8)
  assert make_schedule("zb-h2", devices=4, microbatches=8, backward="split") == plain


@pytest.mark.parametrize("name", ["zb-h1", "zb-h2"])
def test_timetable_in_the_docstring_is_the_drawn_one(name):
  for line in draw_text(simulate(_make(name, 3, 6))).splitlines()[1:4]:
    assert f"  {line}\n" in zero_bubble.__doc__
