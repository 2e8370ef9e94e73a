"""Looped BFS against PyTorch's orders, its bubble, and what it is for: one visit to each chunk."""

import itertools
import json
import pathlib

import pytest

from jaxpipe.schedules import Costs, draw_text, make_schedule, simulate
from jaxpipe.schedules.families import looped_bfs

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "pytorch_loop_orders.json"
CASES = [c for c in json.loads(GOLDEN.read_text())["cases"] if c["schedule"] == "LoopedBFS"]


def _make(P, M, V=2):
  return make_schedule("looped-bfs", devices=P, microbatches=M, chunks=V)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"P{c['P']}M{c['M']}V{c['V']}")
def test_order_is_pytorchs(case):
  schedule = _make(case["P"], case["M"], case["V"])
  assert schedule.tokens() == [row.split() for row in case["order"]]
  assert list(simulate(schedule).peak_activations) == case["peak_act_until_W"]


@pytest.mark.parametrize("P", range(1, 9))
@pytest.mark.parametrize("V", range(1, 5))
def test_bubble_and_memory(P, V):
  for M in range(1, 25):
    timeline = simulate(_make(P, M, V), Costs(7, 8, 6))
    assert timeline.peak_activations == (M * V,) * P
    if M >= P:
      assert timeline.bubble == pytest.approx((P - 1) / (V * M + P - 1), abs=1e-12)


@pytest.mark.parametrize("M", (1, 4, 9))
def test_weights_of_each_layer_are_needed_once_forwards_and_once_backwards(M):
  """Layered gradient accumulation: traffic of weights does not grow with M."""
  for row in _make(4, M, 6).order:
    visits = [key for key, _ in itertools.groupby(row, key=lambda a: (a.stage, a.kind))]
    assert len(visits) == 2 * 6


def test_timetable_in_the_docstring_is_the_drawn_one():
  for line in draw_text(simulate(_make(2, 2))).splitlines()[1:3]:
    assert f"  {line}\n" in looped_bfs.__doc__
