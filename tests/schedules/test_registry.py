"""Every registered schedule against every invariant: a new row is tested by existing."""

import itertools
import json

import pytest

from jaxpipe.schedules import (
  Costs,
  Kind,
  Schedule,
  ScheduleError,
  check_sends,
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

COSTS = Costs(3, 4, 2, 1)
TOOK = {"F": 3, "I": 4, "W": 2, "B": 6}


GRID = [
  (name, P, M, V)
  for name in schedule_names()
  for P in range(1, 9)
  for M in range(1, 25)
  for V in range(1, 5)
  if FAMILIES[name].fits(P, V)
]
WAYS = [
  (name, P, M, V, backward)
  for name, P, M, V in GRID
  if FAMILIES[name].backward == "fused"
  for backward in ("split", "deferred")
]


@pytest.mark.parametrize(
  ("name", "fitting"),
  [
    ("1f1b", {(P, 1) for P in range(1, 9)}),
    ("interleaved-1f1b", {(P, V) for P in range(1, 9) for V in range(1, 5)}),
    ("zb-v", {(P, 2) for P in range(1, 9)}),
    ("hanayo", {(P, V) for P in range(1, 9) for V in (2, 4)}),
    ("chimera", {(P, 2) for P in (2, 4, 6, 8)}),
    ("dualpipe", {(P, 2) for P in (2, 4, 6, 8)}),
    ("bitpipe", {(P, 4) for P in (2, 4, 6, 8)}),
  ],
)
def test_the_sizes_that_a_family_has(name, fitting):
  sizes = {(P, V) for P in range(1, 9) for V in range(1, 5) if FAMILIES[name].fits(P, V)}
  assert sizes == fitting


def _parts(schedule):
  """Every pass through a stage, as (device, kind, stage, microbatch), fused ones as both halves."""
  for d, row in enumerate(schedule.order):
    for step in row:
      for action in step.parts:
        if action.kind.value in "FIWBR":
          for kind in "IW" if action.kind is Kind.B else action.kind.value:
            yield d, kind, action.stage, action.microbatch


@pytest.mark.sampled("name, P, M, V", GRID, 60)
def test_every_size_is_legal_complete_and_drawn(name, P, M, V):
  """What must hold everywhere, in one test: some families search for as long as all of it takes."""
  schedule = make_schedule(name, devices=P, microbatches=M, chunks=V, costs=COSTS)
  _check_legal(schedule, name, P, M)
  timeline = simulate(schedule, COSTS)
  _check_possible(timeline)
  _check_figures(timeline)
  _check_peaks(timeline)
  _check_drawing(timeline)
  _check_round_trips(schedule)
  _check_forward_only(schedule)


@pytest.mark.sampled("name, P, M, V, backward", WAYS, 20)
def test_legal_however_the_backward_is_cut(name, P, M, V, backward):
  sizes = dict(devices=P, microbatches=M, chunks=V)
  schedule = make_schedule(name, **sizes, backward=backward, costs=COSTS)
  _check_legal(schedule, name, P, M)
  assert not any(a.kind is Kind.B for row in schedule.order for step in row for a in step.parts)


def _check_legal(schedule, name, P, M):
  assert (schedule.name, schedule.devices, schedule.microbatches) == (name, P, M)
  assert schedule.check() is schedule
  # Counted here without the checker's help.
  done = list(_parts(schedule))
  assert sorted(part[1:] for part in done) == sorted(
    (kind, s, m) for m in range(M) for s in schedule.path(m) for kind in "FIW"
  )
  homes = {}
  for d, _, stage, m in done:
    assert stage in schedule.placement.table[d]
    assert homes.setdefault((stage, m), d) == d


def _check_possible(timeline):
  """Nobody does two things at once, nothing starts before what it needs, nobody dawdles."""
  schedule = timeline.schedule
  ends = {
    (kind, action.stage, action.microbatch): (d, end)
    for d, row in enumerate(schedule.order)
    for step, end in zip(row, timeline.end[d], strict=True)
    for action in step.parts
    for kind in ("IW" if action.kind is Kind.B else action.kind.value)
  }
  for d, row in enumerate(schedule.order):
    free = 0
    for step, start, end in zip(row, timeline.start[d], timeline.end[d], strict=True):
      needs = [need for action in step.parts for need in _needs(schedule.path, action)]
      arrivals = [ends[need][1] + (ends[need][0] != d) for need in needs]
      assert start == max([free, *arrivals])
      assert end == start + sum(TOOK.get(action.kind.value, 0) for action in step.parts)
      free = end


def _needs(path, action):
  if action.kind.value not in "FIWB":
    return []
  m = action.microbatch
  way = path(m)
  i = way.index(action.stage)
  if action.kind is Kind.F:
    return [("F", way[i - 1], m)] if i else []
  if action.kind is Kind.W:
    return [("I", action.stage, m)]
  return [("F", action.stage, m)] + ([("I", way[i + 1], m)] if i + 1 < len(way) else [])


def _check_figures(timeline):
  schedule, P = timeline.schedule, timeline.schedule.devices
  makespan = max(max(row) for row in timeline.end)
  work = [sum(TOOK[kind] for d, kind, _, _ in _parts(schedule) if d == e) for e in range(P)]
  assert list(timeline.busy) == work
  assert isinstance(timeline.makespan, int) and timeline.makespan == makespan
  assert timeline.bubble == pytest.approx(1 - sum(work) / P / makespan, abs=1e-12)
  spans = [
    max(e) - min(s for s, end in zip(starts, e, strict=True) if end > s)
    for starts, e in zip(timeline.start, timeline.end, strict=True)
  ]
  assert timeline.span == max(spans)
  assert timeline.span_bubble == pytest.approx(1 - max(work) / timeline.span, abs=1e-12)


def _check_peaks(timeline):
  """Counted over time: what a chunk holds from the start of its F to the end of its W or B."""
  for d, row in enumerate(timeline.schedule.order):
    changes = []
    for step, start, end in zip(row, timeline.start[d], timeline.end[d], strict=True):
      for action in step.parts:
        if action.kind is Kind.F:
          changes.append((start, 1))
        elif action.kind in (Kind.W, Kind.B):
          # At the very same moment the next forward may take its place.
          changes.append((end, -1))
    held = list(itertools.accumulate(change for _, change in sorted(changes)))
    assert timeline.peak_activations[d] == max(held)
    assert held[-1] == 0
  assert timeline.peak_memory == timeline.peak_activations


def _check_round_trips(schedule):
  name, M = schedule.name, schedule.microbatches
  again = {"name": name, "paths": schedule.paths}
  assert Schedule.from_tokens(schedule.tokens(), schedule.placement, **again) == schedule
  assert from_json(to_json(simulate(schedule))) == schedule
  if schedule.paths is None:
    # One microbatch passes one replica only, and a CSV shows nothing of the other.
    if M > 1 or not schedule.placement.replicated:
      assert from_csv(to_csv(schedule), name=name) == schedule
  else:
    with pytest.raises(ScheduleError, match="has paths, which a CSV cannot hold; write JSON"):
      to_csv(schedule)


def _check_drawing(timeline):
  schedule = timeline.schedule
  V = schedule.chunks
  rows = draw_text(timeline).splitlines()[1:-1]
  assert len(rows) == schedule.devices
  for d, row in enumerate(rows):
    assert row.endswith(f"| peak {timeline.peak_activations[d]}")
    # Every action that takes time keeps its whole label.
    drawn = [cell.rstrip("-") for cell in row.split("|")[1].split()]
    assert drawn == [
      "/".join(str(a) if V > 1 else str(a)[len(str(a.stage)) :] for a in step.parts)
      for step in schedule.order[d]
      if step.parts[0].kind.value in "FIWB"
    ]
  slices = [e for e in json.loads(draw_perfetto(timeline))["traceEvents"] if e["ph"] == "X"]
  assert len(slices) == sum(len(step.parts) for row in schedule.order for step in row)


def _check_forward_only(schedule):
  P, M = schedule.devices, schedule.microbatches
  forward = schedule.forward_only()
  assert [
    [str(a) for step in row for a in step.parts if a.kind is Kind.F] for row in schedule.order
  ] == forward.tokens()
  timeline = simulate(forward, Costs(2, 5, 5, 1))
  # The first device never waits, so the last microbatch arrives after one trip behind it.
  if schedule.chunks == 1 and schedule.paths is None:
    assert timeline.makespan == (M + P - 1) * 2 + (P - 1)


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("execution, slack", [("barrier", 0), ("coupled", 0), ("coupled", 1)])
def test_waiting_for_others_never_makes_a_schedule_faster(name, execution, slack):
  schedule = make_schedule(name, devices=4, microbatches=6)
  free = simulate(schedule, COSTS)
  bound = simulate(schedule, COSTS, execution=execution, slack=slack)
  for first, second in zip(free.start, bound.start, strict=True):
    assert all(a <= b for a, b in zip(first, second, strict=True))
  if execution == "coupled" and not slack:
    assert bound.makespan <= simulate(schedule, COSTS, execution="barrier").makespan
  assert bound.busy == free.busy


# Two chunks of one device that send over one link, each in its own rhythm.
OVERTAKING = {"bitpipe", "dualpipe", "dualpipe-v", "zb-v", "v-zb"}


@pytest.mark.parametrize("name", schedule_names())
def test_messages_come_in_the_order_of_need(name):
  schedule = make_schedule(name, devices=4, microbatches=6)
  if name in OVERTAKING:
    with pytest.raises(ScheduleError, match="with ordered sends both stand still"):
      check_sends(schedule)
  else:
    check_sends(schedule)


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("P, V", [(P, V) for P in (1, 2, 3) for V in range(1, 5)])
def test_what_does_not_apply_is_refused_with_a_remedy(name, P, V):
  if not FAMILIES[name].fits(P, V):
    with pytest.raises(ValueError, match=r"use (devices|chunks|waves)="):
      make_schedule(name, devices=P, microbatches=4, chunks=V)


@pytest.mark.parametrize("name", schedule_names())
def test_every_family_introduces_itself(name):
  assert FAMILIES[name].summary
  assert "arXiv" in __import__(FAMILIES[name].build.__module__, fromlist=["_"]).__doc__


# These plan with the limit, and may get by with less than they take when there is none.
PLANNING = {"zb-auto", "zb-v", "skippipe", "hanayo", "bitpipe"}


@pytest.mark.parametrize("name", schedule_names())
def test_a_memory_limit_is_kept_or_refused(name):
  sizes = {"devices": 4, "microbatches": 8}
  peak = max(simulate(make_schedule(name, **sizes)).peak_memory)
  make_schedule(name, **sizes, memory_limit=peak)
  low = 0.5 if name in PLANNING else peak - 0.5
  with pytest.raises(ValueError, match="memory_limit"):
    make_schedule(name, **sizes, memory_limit=low)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_refusal_names_the_device_and_the_limit_that_works(name):
  sizes = {"devices": 4, "microbatches": 8}
  peak = max(simulate(make_schedule(name, **sizes)).peak_memory)
  with pytest.raises(ValueError, match=f"holds {peak:g} on device 0, above memory_limit="):
    make_schedule(name, **sizes, memory_limit=peak - 0.5)


def test_limits_by_device():
  sizes = {"devices": 3, "microbatches": 8}
  make_schedule("1f1b", **sizes, memory_limit=(3, 2, 1))
  with pytest.raises(ValueError, match="holds 2 on device 1, above memory_limit=1"):
    make_schedule("1f1b", **sizes, memory_limit=(3, 1, 1))
  with pytest.raises(ValueError, match="memory_limit lists 2 devices, there are 3"):
    make_schedule("1f1b", **sizes, memory_limit=(3, 2))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"name": "2f2b"}, r"unknown schedule '2f2b'; known: gpipe, 1f1b"),
    ({"devices": 0}, r"1f1b cannot run with devices=0; use devices=1 or more"),
    ({"microbatches": -1}, r"1f1b cannot run with microbatches=-1; use microbatches=1 or more"),
    ({"chunks": 0}, r"1f1b cannot run with chunks=0; use chunks=1 or more"),
    ({"chunks": 2}, r"1f1b has 1 chunk\(s\) per device, not 2; use chunks=1"),
    ({"waves": 2}, r"1f1b has no option 'waves'; it has none"),
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
