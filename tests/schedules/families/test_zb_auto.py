"""Planned zero bubble: never behind the paper, its authors' schedulers or any named schedule."""

import json
import pathlib
import random

import pytest

from jaxpipe.schedules import Costs, draw_text, make_schedule, simulate
from jaxpipe.schedules.families import zb_auto

PAPER = json.loads((pathlib.Path(__file__).parents[2] / "golden" / "zero_bubble.json").read_text())


def _plan(P, M, costs=None, memory=(1, 0, -1), limit=None):
  schedule = make_schedule(
    "zb-auto", devices=P, microbatches=M, costs=costs, memory=memory, memory_limit=limit
  )
  return simulate(schedule, costs, memory)


@pytest.mark.parametrize("row", PAPER["table5"], ids=lambda row: f"{row['model']}-{row['m']}")
@pytest.mark.parametrize("column, limit", [("ZB-1p", 8), ("ZB-2p", 16)])
def test_table_5(row, column, limit):
  costs = Costs(row["TF"], row["TB"], row["TW"], row["Tcomm"])
  timeline = _plan(row["p"], row["m"], costs, (1, -(1 - row["w"]), -row["w"]), limit)
  assert round(timeline.span_bubble, 4) <= row["bubble"][column]
  assert max(timeline.peak_memory) <= limit * (1 + 1e-9)


# Weights' shares of the memory, whose decimals do not add up to 1 exactly.
@pytest.mark.parametrize("w", [32 / (34 + 5 * 24 * 1024 / 2304), 3 / 7])
@pytest.mark.parametrize("P, M, hop", [(8, 24, 0.601), (4, 9, 0.0)])
def test_a_limit_is_not_missed_by_rounding(w, P, M, hop):
  """ZB-H1 holds 8 by floats, but a little more by decimals, and was passed over."""
  costs, memory = Costs(18.522, 18.086, 9.337, hop), (1, -(1 - w), -w)
  h1 = simulate(make_schedule("zb-h1", devices=P, microbatches=M), costs, memory)
  for limit in (P, [P] * P):
    timeline = _plan(P, M, costs, memory, limit)
    assert timeline.makespan <= h1.makespan * (1 + 1e-9) and timeline.span <= h1.span * (1 + 1e-9)
    assert max(timeline.peak_memory) <= P * (1 + 1e-9)


@pytest.mark.sampled("case", PAPER["planned"], 30)
def test_authors_schedulers_are_not_better_in_anything(case):
  timeline = _plan(case["P"], case["M"], Costs(*case["T"]), tuple(case["mem"]), case["max_mem"])
  assert timeline.makespan <= case["makespan"]
  assert timeline.span <= case["zb_span"]
  assert max(timeline.peak_memory) <= case["peak_memory"]


@pytest.mark.sampled("seed", range(100), 10)
def test_never_longer_than_a_named_schedule_that_fits(seed):
  draw = random.Random(seed)
  P, M = draw.randint(1, 5), draw.randint(1, 10)
  costs = Costs(
    *([draw.randint(1, 20) for _ in range(P)] for _ in range(3)), hop=draw.randint(0, 4)
  )
  share = draw.choice((0, 0.25, 0.5))
  memory = ([1 + d % 2 for d in range(P)], [-share] * P, [share - 1 - d % 2 for d in range(P)])
  limit = draw.choice((None, [2 + draw.randint(0, 2 * P) for _ in range(P)]))
  plan = _plan(P, M, costs, memory, limit)
  if limit:
    assert all(peak <= most for peak, most in zip(plan.peak_memory, limit, strict=True))
  for name, cuts in {
    **dict.fromkeys(("gpipe", "1f1b"), ("fused", "split", "deferred")),
    **dict.fromkeys(("zb-h1", "zb-h2"), ("split",)),
  }.items():
    for cut in cuts:
      try:
        schedule = make_schedule(
          name,
          devices=P,
          microbatches=M,
          backward=cut,
          costs=costs,
          memory=memory,
          memory_limit=limit,
        )
      except ValueError:  # it does not fit
        continue
      assert plan.makespan <= simulate(schedule, costs).makespan


def test_a_shorter_span_does_not_buy_a_longer_makespan():
  # Without that rule the plan spans 42 and ends at 49.
  costs = Costs((7, 1, 3, 3), (5, 4, 3, 3), (1, 9, 3, 9))
  assert _plan(4, 2, costs).makespan == 48


def test_spends_memory_where_a_device_has_it():
  # All of 2P-1 on the first device alone hides no bubble; on all of them it hides every one.
  assert _plan(4, 12, limit=7).span_bubble == 0
  uneven = _plan(4, 12, limit=(7, 1, 1, 1))
  assert uneven.peak_activations[1:] == (1, 1, 1)


def test_a_limit_that_is_too_low_names_the_one_that_works():
  memory = ([3, 5], -1, [-2, -4])
  with pytest.raises(ValueError, match="holds 5 on device 1; use memory_limit=5 or more"):
    _plan(2, 4, memory=memory, limit=4)
  assert max(_plan(2, 4, memory=memory, limit=5).peak_memory) == 5
  with pytest.raises(ValueError, match="holds 5 on device 1; use memory_limit=3,5 or more"):
    _plan(2, 4, memory=memory, limit=(3, 4))


def test_keeps_backwards_whole_where_a_lone_input_gradient_does_not_fit():
  # As where W waits for more than F keeps, under full rematerialization.
  timeline = _plan(2, 3, memory=(1, 1, -2), limit=1)
  assert timeline.schedule.tokens() == [
    ["0F0", "0B0", "0F1", "0B1", "0F2", "0B2"],
    ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"],
  ]


def test_plans_the_same_every_time():
  costs = Costs((3, 5, 4), 5, (2, 4, 1), 1)
  assert _plan(3, 7, costs, limit=4).schedule == _plan(3, 7, costs, limit=4).schedule


def test_timetable_in_the_docstring_is_the_drawn_one():
  for line in draw_text(_plan(3, 4, Costs(1, 2, 1), limit=3)).splitlines()[1:4]:
    assert f"  {line}\n" in zb_auto.__doc__
