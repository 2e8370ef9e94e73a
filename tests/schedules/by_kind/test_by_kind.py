"""Ticks by kind, replayed by a model of lock-step of these tests' own, against formulas."""

import dataclasses
import itertools
import json
import random
import time

import numpy as np
import pytest

from jaxpipe.schedules import (
  Costs,
  Kind,
  Schedule,
  ScheduleError,
  from_json,
  make_schedule,
  simulate,
  to_csv,
  to_json,
)
from jaxpipe.schedules.command.cli import main
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.ticks import ticks

NAMES = [name for name, family in FAMILIES.items() if family.by_kind]
SIZES = [
  (name, P, V, M)
  for name in NAMES
  for P, V in itertools.product((1, 2, 3, 4, 5, 8), (1, 2, 3, 4))
  if FAMILIES[name].fits(P, V)
  for M in sorted({1, 2, 3, P - 1, P, P + 1, 2 * P, 2 * P + 3, 3 * P + 1, 4 * P} - {0})
]
UNITS = (28, 43, 21)  # F, I and W of a device's whole share: about those of a large transformer


def replay(schedule, costs):
  """Time and peaks of lock-step, in which each tick is as long as its longest action.

  `costs` are F, I and W of one chunk. Raises AssertionError where an action comes too early.
  """
  F, I, W = costs
  lasts = {Kind.F: F, Kind.I: I, Kind.W: W, Kind.B: I + W}
  made, longest, peaks = {"F": {}, "I": {}, "W": {}}, {}, []
  for d, (row, at) in enumerate(zip(schedule.order, ticks(schedule), strict=True)):
    assert list(at) == sorted(set(at))
    held = most = 0
    for action, tick in zip(row, at, strict=True):
      assert schedule.placement.device(action.stage) == d
      longest[tick] = max(longest.get(tick, 0), lasts[action.kind])
      for letter in {"B": "IW"}.get(action.kind.value, action.kind.value):
        assert (action.stage, action.microbatch) not in made[letter]
        made[letter][action.stage, action.microbatch] = tick
      held += action.kind is Kind.F
      most = max(most, held)
      held -= action.kind in (Kind.W, Kind.B)
    peaks.append(most)
  last = schedule.stages - 1
  whole = set(itertools.product(range(last + 1), range(schedule.microbatches)))
  assert all(set(done) == whole for done in made.values())
  for s, m in whole:
    assert s == 0 or made["F"][s, m] > made["F"][s - 1, m]
    assert made["I"][s, m] > made["F"][s, m]
    assert s == last or made["I"][s, m] > made["I"][s + 1, m]
    assert made["W"][s, m] >= made["I"][s, m]
  return sum(longest.values()), peaks


def by_kind(name, P, V, M, **options):
  return make_schedule(name, devices=P, microbatches=M, chunks=V, ticks="kind", **options)


@pytest.mark.sampled("name, P, V, M", SIZES, 60)
@pytest.mark.parametrize("backward", [None, "split", "deferred"])
def test_every_size_is_legal_and_simulated_as_replayed(name, P, V, M, backward):
  if backward == "deferred" and FAMILIES[name].backward == "split":
    backward = None  # those place W themselves, and say so
  schedule = by_kind(name, P, V, M, backward=backward).check()
  time, peaks = replay(schedule, UNITS)
  timeline = simulate(schedule, Costs(*UNITS), execution="barrier")
  assert timeline.makespan == time and list(timeline.peak_activations) == peaks
  # No tick is left on which nobody works.
  used = {tick for row in ticks(schedule) for tick in row}
  assert used == set(range(len(used)))


@pytest.mark.sampled("name, P, V, M", SIZES, 60)
def test_a_tick_is_of_one_kind(name, P, V, M):
  """But for weight gradients as guests, and for the X ticks of 1F1B, which are F or I."""
  schedule = by_kind(name, P, V, M)
  kinds = {}
  for row, at in zip(schedule.order, ticks(schedule), strict=True):
    for action, tick in zip(row, at, strict=True):
      kinds.setdefault(tick, set()).add(action.kind)
  for found in kinds.values():
    found -= {Kind.W} if len(found) > 1 else set()
    assert len(found) == 1 or (name == "1f1b" and found == {Kind.F, Kind.I})


@pytest.mark.parametrize("P, V", [(2, 1), (4, 2), (4, 4), (8, 2), (3, 3)])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 6, 8, 11, 16, 24])
def test_interleaved_takes_the_published_ideal_in_lock_step(P, V, M):
  f, b = 28, 64
  time, peaks = replay(by_kind("interleaved-1f1b", P, V, M), UNITS)
  assert time == (M * V + P - 1 if M >= P else V * P + M - 1) * (f + b)
  if M % P == 0:
    lists = make_schedule("interleaved-1f1b", devices=P, microbatches=M, chunks=V)
    assert by_kind("interleaved-1f1b", P, V, M).order == lists.order
    assert peaks == [min((V + 1) * P - 2 * d - 1, M * V) for d in range(P)]


@pytest.mark.parametrize("P, M", [*itertools.product((1, 2, 4, 7), (1, 3, 4, 8, 19))])
def test_eager_is_as_long_as_1f1b_is_by_free_devices(P, M):
  schedule = by_kind("eager-1f1b", P, 1, M)
  time, peaks = replay(schedule, UNITS)
  assert time == (M + P - 1) * sum(UNITS)
  assert peaks == [min(2 * (P - d) - 1, M) for d in range(P)]
  assert schedule.order == make_schedule("eager-1f1b", devices=P, microbatches=M).order


@pytest.mark.parametrize("P, V", [(2, 1), (4, 1), (8, 1), (4, 2), (8, 2), (8, 4)])
@pytest.mark.parametrize("costs", [UNITS, (10, 14, 8), (10, 20, 5), (10, 8, 5), (10, 8, 10)])
def test_zero_bubble_is_as_long_as_it_is_by_free_devices(P, V, costs):
  F, I, W = costs
  for M in (2 * P, 4 * P):
    time, peaks = replay(by_kind("zb-h1", P, V, M), costs)
    n = M * V
    left_over = (P - 1) * (max(0, W - F) + max(0, W - I))
    assert time == (n + P - 1) * (F + I) + (n - P + 1) * W + left_over
    assert max(peaks) == (V + 1) * P - 1
    free = make_schedule("zb-h1", devices=P, microbatches=M, chunks=V)
    if V == 1:
      assert time == simulate(free, Costs(F, I, W)).makespan


@pytest.mark.parametrize("P", [4, 8, 16])
def test_lock_step_costs_nothing_at_random_costs(P):
  draw = random.Random(P)
  names = [("interleaved-1f1b", 2), ("interleaved-1f1b", 4), ("eager-1f1b", 1)]
  names += [("zb-h1", V) for V in (1, 2, 4)]
  for name, V in names:
    sizes = (4 * P, P + 1, 2 * P + 3, P - 1) if name == "interleaved-1f1b" else (4 * P,)
    for M in sizes:
      schedule = by_kind(name, P, V, M)
      early = make_schedule(name, devices=P, microbatches=M, chunks=V)
      for _ in range(20):
        costs = 1.0, draw.uniform(0.8, 2), draw.uniform(0.5, 1)
        free = simulate(early, Costs(*costs)).makespan
        assert replay(schedule, costs)[0] <= 1.001 * free, (name, V, M, costs)


@pytest.mark.parametrize("P, M", [(4, 16), (8, 32), (8, 9), (3, 2)])
def test_1f1b_keeps_its_own_memory(P, M):
  time, peaks = replay(by_kind("1f1b", P, 1, M), (10, 14, 8))
  assert peaks[0] == min(P, M) and max(peaks) == peaks[0]
  if M >= 2 * P:
    assert time <= P * 10 + (2 * M + P - 2) * 14 + (M - P + 2) * 8
    free = simulate(make_schedule("1f1b", devices=P, microbatches=M), Costs(10, 14, 8)).makespan
    assert time <= 1.05 * free


@pytest.mark.parametrize("P, M", [(4, 16), (8, 32), (8, 16), (16, 64)])
def test_the_v_trades_chunks_for_ticks_of_w(P, M):
  F, I, W = 10, 14, 8
  seen = []
  for j in range(P - 1):
    schedule = by_kind("zb-v", P, 2, M, memory_limit=3 * P - 2 - j)
    time, peaks = replay(schedule, (F, I, W))
    assert time <= (2 * M + 2 * P - 2) * (F + I) + (2 * M - 2 * P + 2 + j) * W
    assert max(peaks) <= 3 * P - 2 - j
    seen.append(time)
  assert seen == sorted(seen)
  with pytest.raises(ValueError, match=f"above memory_limit={P}"):
    by_kind("zb-v", P, 2, M, memory_limit=P)


@pytest.mark.sampled("name, P, V, M", [case for case in SIZES if case[3] > 1], 20)
def test_recompute_is_a_guest_or_has_a_tick_of_its_own(name, P, V, M):
  plain = by_kind(name, P, V, M)
  if plain.ticks is None:
    return
  schedule = by_kind(name, P, V, M, recompute=True).check()
  F, I, W = UNITS

  def longest(schedule):
    found = {}
    for row, at in zip(schedule.order, schedule.ticks, strict=True):
      for action, tick in zip(row, at, strict=True):
        lasts = {Kind.F: F, Kind.R: F, Kind.I: I, Kind.W: W, Kind.B: I + W}[action.kind]
        found[tick] = max(found.get(tick, 0), lasts)
    return found

  # Ticks of R alone are all that it adds.
  alone = len(longest(schedule)) - len(longest(plain))
  assert sum(longest(schedule).values()) == sum(longest(plain).values()) + alone * F
  back = {Kind.B, Kind.I}
  rows = [zip(row, ticks(plain)[d], strict=True) for d, row in enumerate(plain.order)]
  assert alone <= len({tick for row in rows for action, tick in row if action.kind in back})
  without = [[a for a in row if a.kind is not Kind.R] for row in schedule.order]
  assert without == [list(row) for row in plain.order]
  assert sum(a.kind is Kind.R for row in schedule.order for a in row) == M * P * V


@pytest.mark.sampled("name, P, V, M", SIZES, 20)
def test_files_hold_the_ticks(name, P, V, M):
  schedule, early = (
    make_schedule(name, devices=P, microbatches=M, chunks=V, ticks=t) for t in ("kind", "early")
  )
  text = to_json(simulate(schedule))
  assert json.loads(text)["ticks"] == [list(row) for row in ticks(schedule)]
  back = from_json(text, schedule.placement)
  assert back == schedule
  text = to_json(simulate(early))
  assert json.loads(text)["ticks"] == [list(row) for row in ticks(early)]
  assert from_json(text, early.placement) == early
  if schedule.ticks is not None:
    with pytest.raises(ScheduleError, match="has ticks of its own, which a CSV cannot hold"):
      to_csv(schedule)


ORDER = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]


@pytest.mark.parametrize(
  "own, message",
  [
    ([[0, 1, 3, 5], [1, 2, 3]], r"ticks have \[4, 3\] numbers for lists of \[4, 4\] steps"),
    ([[0, 1, 3, 3], [1, 2, 3, 4]], "0B1 on device 0 has tick 3 after 3; ticks of a device rise"),
    ([[-1, 1, 3, 5], [1, 2, 3, 4]], "0F0 on device 0 has tick -1; ticks of a device rise"),
    ([[0, 1, 2, 5], [1, 2, 3, 4]], "0B0 on device 0 has tick 2, and waits for 1B0 on device 1"),
    ([[0, 1, 3, 5], [0, 2, 3, 4]], "1F0 on device 1 has tick 0, and waits for 0F0 on device 0"),
  ],
)
def test_ticks_that_cannot_be_are_refused(own, message):
  with pytest.raises(ScheduleError, match=message):
    Schedule.from_tokens(ORDER, ticks=own)


def test_ticks_of_ones_own_are_followed_and_may_leave_gaps():
  own = [[0, 2, 6, 9], [1, 3, 4, 8]]
  schedule = Schedule.from_tokens(ORDER, ticks=own)
  assert ticks(schedule) == schedule.ticks == tuple(map(tuple, own))
  # Later ticks move back, and those that stand together stay together.
  assert ticks(schedule, 1) == ((0, 3, 7, 11), (2, 4, 5, 9))
  assert Schedule.from_tokens(ORDER, ticks=ticks(Schedule.from_tokens(ORDER))).ticks is None
  assert schedule.forward_only().ticks is None
  assert schedule.with_order(schedule.order) is schedule
  with pytest.raises(ScheduleError, match="has ticks of its own, which would not fit other lists"):
    schedule.with_order(schedule.order[::-1])
  # A pair takes two ticks of a program, and all other devices wait for the second.
  paired = make_schedule("dualpipe-v", devices=2, microbatches=4)
  apart = dataclasses.replace(paired, ticks=ticks(paired)).check().of_kinds(Kind).check()
  assert max(map(max, apart.ticks)) < 2 * max(map(max, ticks(paired)))


@pytest.mark.parametrize(
  "own", [[[0, 1, 3.5, 5], [1, 2, 3, 4]], [[0, 1, 3, 5], [True, 2, 3, 4]], [[0, 1, 3, "5"], None]]
)
def test_ticks_are_whole_numbers(own):
  with pytest.raises(ScheduleError, match="ticks are a list of whole numbers for each device, not"):
    Schedule.from_tokens(ORDER, ticks=own)


def test_ticks_may_be_of_numpy_and_are_bounded():
  own = np.array([[0, 2, 6, 9], [1, 3, 4, 8]])
  schedule = Schedule.from_tokens(ORDER, ticks=own)
  assert json.loads(to_json(simulate(schedule)))["ticks"] == own.tolist()
  own[0, 3] = 181
  with pytest.raises(ScheduleError, match="tick 181 is beyond 180, which is plenty for 8 steps"):
    Schedule.from_tokens(ORDER, ticks=own)


def test_a_long_schedule_takes_linear_time():
  schedule = by_kind("interleaved-1f1b", 4, 2, 2000)
  begun = time.process_time()
  ticks(schedule, 1)
  assert time.process_time() - begun < 3  # it took 1.5 s at a quarter of the length


def test_what_has_no_ticks_by_kind_is_refused_by_name(capsys):
  flags = ["--devices", "4", "--microbatches", "8"]
  assert main(["v-half", *flags, "--ticks", "kind"]) == 2
  error = capsys.readouterr().err
  assert f"v-half has no ticks by kind; those that have them: {', '.join(NAMES)}" in error
  with pytest.raises(ValueError, match="no ticks by kind for the passes of head='sharded'"):
    by_kind("gpipe", 4, 1, 8, head="sharded")
  with pytest.raises(ValueError, match="1f1b with a fused backward has no ticks by kind"):
    by_kind("1f1b", 4, 1, 8, backward="fused")
  for name, backward in itertools.product(("zb-h1", "zb-v"), ("fused", "deferred")):
    with pytest.raises(
      ValueError, match=f'{name} places weight gradients on its own; use .*"{backward}"'
    ):
      by_kind(name, 4, 2, 8, backward=backward)
  with pytest.raises(ValueError, match="ticks='late'; use ticks='early' or ticks='kind'"):
    make_schedule("gpipe", devices=2, microbatches=2, ticks="late")
  assert main(["compare", *flags, "--ticks", "kind"]) == 2
  assert "drop --ticks" in capsys.readouterr().err
  assert main(["1f1b", *flags, "--ticks", "kind", "--vocabulary", "1"]) == 2
  assert "--ticks kind has no place for what --vocabulary adds" in capsys.readouterr().err
