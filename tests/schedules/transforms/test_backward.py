"""Cuts of the backward pass: 2BP's published gains, and what no cut may change."""

import fractions

import pytest

from jaxpipe.schedules import (
  Costs,
  Kind,
  Schedule,
  draw_text,
  make_schedule,
  simulate,
)
from jaxpipe.schedules.transforms import backward
from jaxpipe.schedules.transforms.backward import with_backward

COSTS = [Costs(), Costs(1, 2, 3, 1), Costs(5, 2, 7), Costs(10, 12, 8, 1)]


def _make(name, P, M, cut, costs=None):
  return make_schedule(name, devices=P, microbatches=M, backward=cut, costs=costs)


def _bubble(name, P, M, cut):
  timeline = simulate(_make(name, P, M, cut))
  total = P * timeline.makespan
  return fractions.Fraction(total - sum(timeline.busy), total)


@pytest.mark.parametrize("N", (4, 8))
@pytest.mark.parametrize(
  "name, microbatches, before, after",
  [
    ("gpipe", lambda N: 1, lambda N: (N - 1, N), lambda N: (2 * (N - 1), 2 * N + 1)),
    ("gpipe", lambda N: N, lambda N: (N - 1, 2 * N - 1), lambda N: (2 * (N - 1), 5 * N - 2)),
    ("1f1b", lambda N: N, lambda N: (N - 1, 2 * N - 1), lambda N: (N - 1, 4 * N - 1)),
    ("1f1b", lambda N: 2 * N, lambda N: (N - 1, 3 * N - 1), lambda N: (N - 1, 7 * N - 1)),
  ],
  ids=["naive", "gpipe", "1f1b-1", "1f1b-2"],
)
def test_gains_of_deferring(N, name, microbatches, before, after):
  M = microbatches(N)
  assert _bubble(name, N, M, "fused") == fractions.Fraction(*before(N))
  assert _bubble(name, N, M, "deferred") == fractions.Fraction(*after(N))


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b", "looped-bfs"])
def test_deferring_keeps_the_order_of_passes_and_is_never_slower(name, costs):
  for P in (1, 2, 4, 5):
    for M in (1, 3, 4, 8):
      fused, deferred = (_make(name, P, M, cut, costs) for cut in ("fused", "deferred"))
      assert simulate(deferred, costs).makespan <= simulate(fused, costs).makespan
      for before, after in zip(fused.tokens(), deferred.tokens(), strict=True):
        assert [t for t in after if "W" not in t] == [t.replace("B", "I") for t in before]


def test_gaps_follow_from_the_costs():
  # Gradients reach device 0 a forward and a gradient apart: no gap where forwards take no time.
  assert _make("1f1b", 2, 2, "deferred").tokens()[0][2:] == ["0I0", "0W0", "0I1", "0W1"]
  row = _make("1f1b", 2, 2, "deferred", Costs(forward=0)).tokens()[0]
  assert row[2:] == ["0I0", "0I1", "0W0", "0W1"]


def test_split_and_fused_undo_each_other():
  fused = _make("1f1b", 3, 5, "fused")
  split = with_backward(fused, "split")
  assert all(a.kind is not Kind.B for row in split.order for a in row)
  assert with_backward(split, "fused") == fused
  assert with_backward(split, "split") == split
  assert with_backward(split, "deferred", Costs()) == with_backward(fused, "deferred", Costs())


def test_overlapped_backwards_are_cut_like_others():
  fused = Schedule.from_tokens([["0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"]])
  split = with_backward(fused, "split").check()
  assert split.tokens() == [["0F0", "(0F1;0I0)OVERLAP_F_B", "0W0", "0I1", "0W1"]]
  assert with_backward(split, "fused") == fused
  deferred = with_backward(fused, "deferred").check()
  assert deferred.tokens() == [["0F0", "(0F1;0I0)OVERLAP_F_B", "0I1", "0W0", "0W1"]]


def test_the_optimizer_still_comes_after_its_gradients():
  tokens = [["0F0", "0B0", "0U0"], ["1F0", "1B0", "1U0"]]
  deferred = with_backward(Schedule.from_tokens(tokens), "deferred", Costs(update=1)).check()
  assert deferred.tokens() == [["0F0", "0I0", "0W0", "0U0"], ["1F0", "1I0", "1W0", "1U0"]]


def test_unknown_cut():
  with pytest.raises(ValueError, match="unknown backward 'half'; known: fused, split, deferred"):
    with_backward(_make("gpipe", 2, 2, None), "half")


@pytest.mark.parametrize("cut", ["fused", "deferred"])
def test_timetable_in_the_docstring_is_the_drawn_one(cut):
  for line in draw_text(simulate(_make("1f1b", 3, 3, cut))).splitlines()[1:4]:
    assert f"  {line}\n" in backward.__doc__
