"""Every registered schedule against every invariant: a new row is tested by existing."""

import json

import pytest

from jaxpipe.schedules import (
  Costs,
  Kind,
  Schedule,
  draw_perfetto,
  draw_text,
  from_csv,
  from_json,
  make_schedule,
  schedule_names,
  simulate,
  to_csv,
  to_json,
)
from jaxpipe.schedules.registry import FAMILIES

GRID = [
  (name, P, M, backward)
  for name in schedule_names()
  for P in range(1, 9)
  for M in range(1, 25)
  for backward in ("fused", "split")
]
COSTS = Costs(3, 4, 2, 1)


def _make(name, P, M, backward):
  return make_schedule(name, devices=P, microbatches=M, backward=backward)


@pytest.mark.sampled("name, P, M, backward", GRID, 40)
def test_legal_and_complete(name, P, M, backward):
  schedule = _make(name, P, M, backward)
  assert (schedule.name, schedule.devices, schedule.microbatches) == (name, P, M)
  assert schedule.check() is schedule
  # Counted here without the checker's help.
  done = [
    (part, action.stage, action.microbatch, schedule.placement.device(action.stage) == d)
    for d, row in enumerate(schedule.order)
    for action in row
    for part in ("IW" if action.kind is Kind.B else action.kind.value)
  ]
  assert sorted(done) == sorted(
    (part, s, m, True) for part in "FIW" for s in range(schedule.stages) for m in range(M)
  )


@pytest.mark.sampled("name, P, M, backward", GRID, 40)
def test_timeline_is_possible(name, P, M, backward):
  """Nobody does two things at once, nothing starts before what it needs, nobody dawdles."""
  schedule = _make(name, P, M, backward)
  timeline = simulate(schedule, COSTS)
  took = {"F": 3, "I": 4, "W": 2, "B": 6}
  ends = {
    (part, action.stage, action.microbatch): (d, end)
    for d, row in enumerate(schedule.order)
    for action, end in zip(row, timeline.end[d], strict=True)
    for part in ("IW" if action.kind is Kind.B else action.kind.value)
  }
  last = schedule.stages - 1
  for d, row in enumerate(schedule.order):
    free = 0
    for action, start, end in zip(row, timeline.start[d], timeline.end[d], strict=True):
      s, m = action.stage, action.microbatch
      needs = {
        "F": [("F", s - 1, m)] if s else [],
        "W": [("I", s, m)],
      }.get(action.kind.value, [("F", s, m)] + ([("I", s + 1, m)] if s < last else []))
      arrivals = [ends[need][1] + (ends[need][0] != d) for need in needs]
      assert start == max([free, *arrivals])
      assert end == start + took[action.kind.value]
      free = end


@pytest.mark.sampled("name, P, M, backward", GRID, 40)
def test_figures_agree_with_the_timeline(name, P, M, backward):
  schedule = _make(name, P, M, backward)
  timeline = simulate(schedule, COSTS)
  makespan = max(max(row) for row in timeline.end)
  work = 9 * M * schedule.chunks
  assert timeline.busy == (work,) * P
  assert isinstance(timeline.makespan, int) and timeline.makespan == makespan
  assert timeline.bubble == pytest.approx(1 - work / makespan, abs=1e-12)
  spans = [max(e) - min(s) for s, e in zip(timeline.start, timeline.end, strict=True)]
  assert timeline.span == max(spans)
  assert timeline.span_bubble == pytest.approx(1 - work / timeline.span, abs=1e-12)
  assert timeline.peak_memory == timeline.peak_activations
  assert all(1 <= peak <= M * schedule.chunks for peak in timeline.peak_activations)


@pytest.mark.sampled("name, P, M, backward", GRID, 30)
def test_round_trips(name, P, M, backward):
  schedule = _make(name, P, M, backward)
  assert Schedule.from_tokens(schedule.tokens(), schedule.placement, name=name) == schedule
  assert from_csv(to_csv(schedule), name=name) == schedule
  assert from_json(to_json(simulate(schedule))) == schedule


@pytest.mark.sampled("name, P, M, backward", GRID, 30)
def test_draws(name, P, M, backward):
  timeline = simulate(_make(name, P, M, backward), COSTS)
  rows = draw_text(timeline).splitlines()[1:-1]
  assert len(rows) == P
  for d, row in enumerate(rows):
    assert row.endswith(f"| peak {timeline.peak_activations[d]}")
    # Every action keeps its whole label.
    drawn = [cell.rstrip("-") for cell in row.split("|")[1].split()]
    assert drawn == [
      str(a) if timeline.schedule.chunks > 1 else str(a)[len(str(a.stage)) :]
      for a in timeline.schedule.order[d]
    ]
  slices = [e for e in json.loads(draw_perfetto(timeline))["traceEvents"] if e["ph"] == "X"]
  assert len(slices) == sum(map(len, timeline.schedule.order))
  assert sum(e["dur"] for e in slices) == 1000 * sum(timeline.busy)


@pytest.mark.sampled("name, P, M, backward", GRID, 30)
def test_forward_only(name, P, M, backward):
  schedule = _make(name, P, M, backward)
  forward = schedule.forward_only()
  assert [[str(a) for a in row if a.kind is Kind.F] for row in schedule.order] == forward.tokens()
  timeline = simulate(forward, Costs(2, 5, 5, 1))
  # The first device never waits, so the last microbatch arrives after one trip behind it.
  if schedule.chunks == 1:
    assert timeline.makespan == (M + P - 1) * 2 + (P - 1)


@pytest.mark.parametrize("name", schedule_names())
def test_every_family_introduces_itself(name):
  assert FAMILIES[name].summary
  assert "arXiv" in __import__(FAMILIES[name].build.__module__, fromlist=["_"]).__doc__


@pytest.mark.parametrize("name", schedule_names())
def test_memory_limit_is_exact(name):
  sizes = {"devices": 4, "microbatches": 8}
  peak = max(simulate(make_schedule(name, **sizes)).peak_memory)
  make_schedule(name, **sizes, memory_limit=peak)
  with pytest.raises(ValueError, match=f"holds {peak:g} on device 0, above memory_limit="):
    make_schedule(name, **sizes, memory_limit=peak - 0.5)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"name": "2f2b"}, r"unknown schedule '2f2b'; known: gpipe, 1f1b"),
    ({"devices": 0}, r"1f1b cannot run with devices=0; use devices=1 or more"),
    ({"microbatches": -1}, r"1f1b cannot run with microbatches=-1; use microbatches=1 or more"),
    ({"chunks": 0}, r"1f1b cannot run with chunks=0; use chunks=1 or more"),
    ({"chunks": 2}, r"1f1b has 1 chunk\(s\) per device, not 2; use chunks=1"),
    ({"backward": "deferred"}, r'backward="deferred" is not available yet; use "fused" or "split"'),
    ({"backward": "halved"}, r"unknown backward 'halved'; known: fused, split, deferred"),
    (
      {"memory_limit": 3},
      r"1f1b holds 4 on device 0, above memory_limit=3; use memory_limit=4, fewer microbatches",
    ),
  ],
)
def test_refusals_name_the_numbers_and_the_remedy(changes, message):
  arguments = {"name": "1f1b", "devices": 4, "microbatches": 8} | changes
  with pytest.raises(ValueError, match=message):
    make_schedule(arguments.pop("name"), **arguments)
