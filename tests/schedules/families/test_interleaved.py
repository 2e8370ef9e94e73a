"""Interleaved 1F1B against PyTorch's orders and the papers' formulas."""

import json
import pathlib

import pytest

from jaxpipe.schedules import Costs, draw_text, make_schedule, simulate
from jaxpipe.schedules.families import interleaved

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
CASES = [
  case
  for case in json.loads((GOLDEN / "pytorch_loop_orders.json").read_text())["cases"]
  if case["schedule"] == "Interleaved1F1B"
]
TABLE5 = json.loads((GOLDEN / "zero_bubble.json").read_text())["table5"]


def _make(P, M, V=2):
  return make_schedule("interleaved-1f1b", devices=P, microbatches=M, chunks=V)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"P{c['P']}M{c['M']}V{c['V']}")
def test_order_is_pytorchs(case):
  schedule = _make(case["P"], case["M"], case["V"])
  assert schedule.tokens() == [row.split() for row in case["order"]]
  assert list(simulate(schedule).peak_activations) == case["peak_act_until_W"]


@pytest.mark.parametrize("P", range(1, 9))
@pytest.mark.parametrize("V", range(1, 5))
def test_every_number_of_microbatches_is_legal(P, V):
  for M in range(1, 25):
    assert _make(P, M, V).chunks == V


def test_uneven_rounds_deal_the_longer_first():
  row = _make(4, 9, 2).tokens()[0]
  assert [token for token in row if "F" in token] == [
    *(f"{s}F{m}" for s in (0, 4) for m in range(5)),
    *(f"{s}F{m}" for s in (0, 4) for m in range(5, 9)),
  ]


@pytest.mark.parametrize("P", range(1, 9))
@pytest.mark.parametrize("V", (2, 3, 4))
def test_bubble_and_memory_are_the_papers(P, V):
  for M in range(P, 25, P):
    timeline = simulate(_make(P, M, V), Costs(7, 8, 6))
    assert timeline.makespan == (M * V + P - 1) * 21
    assert timeline.bubble == pytest.approx((P - 1) / (V * M + P - 1), abs=1e-12)
    # A chunk is a V-th of what 1F1B holds for a microbatch; 1F1B holds P of them.
    if M > P:
      assert timeline.peak_activations[0] == P * V + P - 1


@pytest.mark.parametrize("row", TABLE5, ids=lambda row: f"{row['model']}-{row['m']}")
def test_table_5_of_zero_bubble(row):
  # The paper does not give the number of chunks: these are the ones that reproduce it.
  P, V = row["p"], {"1.5B": 3, "6.2B": 4}[row["model"]]
  times = (row[name] / V for name in ("TF", "TB", "TW"))
  timeline = simulate(_make(P, row["m"], V), Costs(*times, hop=row["Tcomm"]))
  # For an unknown reason the paper counts P hops fewer than its order takes, in all its rows.
  span = timeline.span - P * row["Tcomm"]
  assert round((span - max(timeline.busy)) / span, 4) == row["bubble"]["1F1B-I"]


def test_timetable_in_the_docstring_is_the_drawn_one():
  for line in draw_text(simulate(_make(2, 2))).splitlines()[1:3]:
    assert f"  {line}\n" in interleaved.__doc__
