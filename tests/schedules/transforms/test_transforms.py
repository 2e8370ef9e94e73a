"""What is added to finished schedules: recompute, vocabulary passes, fillers, optimizer steps."""

import cProfile
import dataclasses
import itertools
import random

import pytest

from jaxpipe.schedules import (
  Action,
  Costs,
  Kind,
  Overlap,
  Placement,
  Schedule,
  dependencies,
  make_schedule,
  schedule_names,
  simulate,
)
from jaxpipe.schedules.transforms import shift, vocabulary
from jaxpipe.schedules.transforms.fillers import with_fillers
from jaxpipe.schedules.transforms.recompute import with_recompute
from jaxpipe.schedules.transforms.validation import with_post_validation
from jaxpipe.schedules.transforms.vocabulary import with_vocabulary

UNEVEN = Costs(3, 2, 4, 1, recompute=2, head=12, filler=(5, 2), update=1)
TRANSFORMS = {
  "recompute": (lambda s, costs: with_recompute(s, costs), {Kind.R}),
  "vocabulary 1": (lambda s, costs: with_vocabulary(s, 1, costs), {Kind.S, Kind.T}),
  "vocabulary 2": (lambda s, costs: with_vocabulary(s, 2, costs), {Kind.S, Kind.T}),
  "fillers": (lambda s, costs: with_fillers(s, 2, costs), {Kind.Y}),
  "validation": (lambda s, costs: with_post_validation(s), {Kind.U}),
}
NAMED = list(itertools.product(schedule_names(), (1, 2, 3, 4, 6, 8), (1, 2, 4, 7, 12)))
PLACED = list(itertools.product(("loop", "v", "wave", "mirrored", "paths"), range(20)))


def _named(name, P, M):
  try:
    return make_schedule(name, devices=P, microbatches=M)
  except ValueError as error:
    pytest.skip(str(error))


def _random(kind, seed):
  """Any legal schedule: at every step a random device runs something that it can."""
  draw = random.Random(f"{kind} {seed}")
  P, M = draw.choice((2, 4)), draw.randint(1, 5)
  stages = P if kind in ("mirrored", "paths") else 2 * P
  placement = Placement.named("loop" if kind == "paths" else kind, P, stages)
  paths = None
  if kind == "paths":
    # At least one stage each, in any order.
    paths = tuple(tuple(draw.sample(range(P), draw.randint(1, P))) for _ in range(M))
  empty = Schedule("random", placement, M, ((),) * P, paths)
  todo = [[] for _ in range(P)]
  for m in range(M):
    for stage in empty.path(m):
      homes = placement.homes(stage)
      halves = draw.choice(((Kind.B,), (Kind.I, Kind.W)))
      todo[homes[m % len(homes)]] += (Action(stage, kind, m) for kind in (Kind.F, *halves))
  rows, done = [[] for _ in range(P)], set()
  while any(todo):
    able = {
      d: [a for a in row if done.issuperset(dependencies(a, empty))] for d, row in enumerate(todo)
    }
    d = draw.choice([d for d in able if able[d]])
    step = draw.choice(able[d])
    others = [a for a in able[d] if a.kind in (Kind.B, Kind.I) and a.microbatch != step.microbatch]
    if step.kind is Kind.F and others:
      step = Overlap(step, draw.choice(others))
    rows[d].append(step)
    for part in step.parts:
      todo[d].remove(part)
      done.add(part if part.kind is not Kind.B else Action(part.stage, Kind.I, part.microbatch))
  return dataclasses.replace(empty, order=tuple(map(tuple, rows))).check()


def _apply(transform, schedule, costs):
  try:
    return TRANSFORMS[transform][0](schedule, costs)
  except ValueError as error:
    # Only these may refuse, and only for these reasons.
    kinds = {part.kind for row in schedule.order for step in row for part in step.parts}
    if transform == "validation":
      assert schedule.placement.replicated
    else:
      assert transform.startswith("vocabulary") and Kind.G in kinds
    pytest.skip(str(error))


def _check_transform(transform, schedule, costs):
  added = TRANSFORMS[transform][1]
  result = _apply(transform, schedule, costs).check()
  assert dataclasses.replace(result, order=schedule.order, vocabulary=0) == schedule
  for before, after in zip(schedule.order, result.order, strict=True):
    if added != {Kind.S, Kind.T}:
      assert [step for step in after if step.parts[0].kind not in added] == list(before)
      continue
    before, after = ([part for step in row for part in step.parts] for row in (before, after))
    for others in (False, True):
      assert [a for a in after if a.kind not in added and (a.kind is Kind.F) == others] == [
        a for a in before if (a.kind is Kind.F) == others
      ]
  with pytest.raises(ValueError, match=r"already|once"):
    TRANSFORMS[transform][0](result, costs)
  return result


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.sampled("name, P, M", NAMED, 12)
def test_transform_of_a_named_schedule_is_legal_and_keeps_its_order(transform, name, P, M):
  _check_transform(transform, _named(name, P, M), UNEVEN)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.sampled("kind, seed", PLACED, 8)
def test_transform_of_any_schedule_is_legal_and_keeps_its_order(transform, kind, seed):
  costs = dataclasses.replace(UNEVEN, head=seed % 3 * 4, hop=seed % 4)
  _check_transform(transform, _random(kind, seed), costs)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_take_linear_time(transform):
  def calls(M):
    """Calls of Python functions, which no other load on the machine changes."""
    schedule = make_schedule("1f1b", devices=32, microbatches=M)
    profile = cProfile.Profile(builtins=False)
    profile.runcall(TRANSFORMS[transform][0], schedule, UNEVEN)
    return sum(entry.callcount for entry in profile.getstats())

  assert calls(512) < 3.5 * calls(170)


def test_transforms_can_be_combined():
  costs = dataclasses.replace(UNEVEN, head=12)
  schedule = make_schedule("1f1b", devices=4, microbatches=6)
  schedule = with_vocabulary(with_recompute(schedule, costs), 1, costs)
  schedule = with_fillers(with_post_validation(schedule), 2, costs).check()
  assert {a.kind for row in schedule.order for a in row} == {Kind(k) for k in "FRBSTYU"}


# Recompute.


def _glued(schedule):
  """R directly before every backward, whatever the gaps."""

  def steps(step):
    back = [a for a in step.parts if a.kind in (Kind.B, Kind.I)]
    return (*(Action(a.stage, Kind.R, a.microbatch) for a in back), step)

  order = tuple(tuple(a for step in row for a in steps(step)) for row in schedule.order)
  return dataclasses.replace(schedule, order=order)


def _inside(costs, S):
  """The costs of a backward that recomputes by itself."""
  times = costs.durations(S)
  both = [i + r for i, r in zip(times[Kind.I], times[Kind.R], strict=True)]
  return dataclasses.replace(costs, input_grad=both)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.sampled("P, M", list(itertools.product(range(1, 9), range(1, 17))), 10)
def test_recompute_leaves_the_drain(name, P, M):
  F, R, B = 2, 3, 5
  costs = Costs(F, 2, 3, recompute=R)
  schedule = make_schedule(name, devices=P, microbatches=M)
  inside = simulate(schedule, _inside(costs, P)).makespan
  placed = simulate(with_recompute(schedule, costs), costs)
  assert placed.makespan == M * (F + R + B) + (P - 1) * (F + B)
  assert inside == (M + P - 1) * (F + R + B)


@pytest.mark.sampled("name, P, M", NAMED, 12)
def test_recompute_is_no_slower_than_before_every_backward(name, P, M):
  schedule = _named(name, P, M)
  S = schedule.stages
  weights = [1 + 3 * (s % 3 == 0) for s in range(S)]
  for costs in (Costs(), UNEVEN, Costs(weights, 4, 4, 2), Costs(weights[::-1], 3, 2)):
    placed = simulate(with_recompute(schedule, costs), costs)
    glued = simulate(_glued(schedule), costs)
    assert placed.makespan <= glued.makespan + 1e-9
    assert placed.span <= glued.span + 1e-9
    assert glued.makespan <= simulate(schedule, _inside(costs, S)).makespan


def test_recompute_fills_long_gaps():
  # A slow first stage waits for its first gradient; later it has no time.
  costs = Costs((9, 3, 3, 3), 4, 4)
  schedule = make_schedule("gpipe", devices=4, microbatches=16)
  assert simulate(_glued(schedule), costs).makespan == 443
  assert simulate(with_recompute(schedule, costs), costs).makespan == 422


def test_late_recompute_keeps_the_span():
  # Where the makespan leaves the first device time after its last pass, its span does not.
  costs = Costs((5, 9, 3), (3, 3, 4), (3, 4, 4), recompute=1)
  schedule = make_schedule("zb-h2", devices=3, microbatches=3)
  timeline = simulate(with_recompute(schedule, costs), costs)
  assert (timeline.makespan, timeline.span) == (56, 54)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b"])
def test_recompute_is_late_where_early_gains_nothing(name):
  schedule = make_schedule(name, devices=4, microbatches=8)
  timeline = simulate(with_recompute(schedule), memory=(0, 0, -1, 1))
  # One backward's worth at a time.
  assert timeline.peak_memory == (1, 1, 1, 1)


def test_recompute_stays_where_its_weights_are():
  rows = [["0G0", "0F0", "0F1", "0X0", "0G0", "0B0", "0B1", "0X0"]]
  rows += [["1G0", "1F0", "1F1", "1X0", "1G0", "1B0", "1B1", "1X0"]]
  result = with_recompute(Schedule.from_tokens(rows), Costs(gather=1)).check()
  for d, row in enumerate(result.tokens()):
    assert row.index(f"{d}R0") > 4


# Vocabulary.


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("P", range(2, 9))
def test_1f1b_holds_one_more_microbatch_per_barrier(P, barriers):
  costs = Costs(2, 2, 2, head=4 * P)
  schedule = with_vocabulary(make_schedule("1f1b", devices=P, microbatches=3 * P), barriers, costs)
  assert simulate(schedule, costs).peak_activations == tuple(P - d + barriers for d in range(P))


def _new_bubble(fewer, more):
  """What the makespan grows by beyond the work of the busiest device."""
  work = max(after - before for before, after in zip(fewer.busy, more.busy, strict=True))
  return more.makespan - fewer.makespan - work


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.sampled("name, P", list(itertools.product(schedule_names(), (2, 3, 4, 6, 8))), 6)
def test_vocabulary_passes_add_no_bubble_per_microbatch(name, P, barriers):
  costs = Costs(2, 2, 2, head=4 * P)
  # Some families group microbatches by P or 2P.
  plain = [_named(name, P, M) for M in (6 * P, 8 * P)]
  spread = [simulate(_apply(f"vocabulary {barriers}", s, costs), costs) for s in plain]
  for before, after in zip(plain, spread, strict=True):
    peaks = zip(simulate(before).peak_activations, after.peak_activations, strict=True)
    assert all(now <= then + barriers for then, now in peaks)
  # Units that follow one another have a bubble between them anyway, and uneven loads have several.
  even = plain[0].paths is None and not plain[0].placement.replicated
  anyway = _new_bubble(*(simulate(schedule, Costs(2, 2, 2)) for schedule in plain))
  grown = spread[1].makespan - spread[0].makespan
  # With one barrier, V-Min of 5, 8, 11 ... devices has no chunk to spare for it.
  tight = grown / 13 if name == "v-min" and P % 3 == 2 and P > 2 and barriers == 1 else 0
  assert _new_bubble(*spread) <= (tight if even else max(anyway, 0.05 * grown))
  # A head on the last stage costs a bubble on all others, for every microbatch; where every device
  # has a last stage it does not.
  whole = simulate(plain[1], costs)
  assert 4 * _idle(spread[1]) < _idle(whole) or (P == 2 and not even)


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1"])
@pytest.mark.parametrize("costs", [Costs(1, 1, 1), Costs(4, 4, 4, 1), Costs(2, 1, 3)])
def test_steady_state_is_full_and_bubble_that_of_a_balanced_pipeline(name, costs, barriers):
  P = 4
  headed = dataclasses.replace(costs, head=8)
  plain = [make_schedule(name, devices=P, microbatches=M) for M in (16, 17, 20)]
  spread = [simulate(with_vocabulary(s, barriers, headed), headed) for s in plain]
  # Interleaved runs rounds of P microbatches.
  step = 2 if name == "interleaved-1f1b" else 1
  growth = spread[step].makespan - spread[0].makespan
  assert P * growth == sum(spread[step].busy) - sum(spread[0].busy)
  assert _idle(spread[0]) <= _idle(simulate(plain[0], costs))


def test_without_the_shift_every_microbatch_has_a_bubble(monkeypatch):
  costs = Costs(2, 2, 2, head=8)
  schedules = [make_schedule("1f1b", devices=8, microbatches=M) for M in (24, 32)]
  monkeypatch.setattr(vocabulary, "shifted", lambda schedule, by: shift.shifted(schedule, 0))
  for barriers in (1, 2):
    first, second = (simulate(with_vocabulary(s, barriers, costs), costs) for s in schedules)
    assert 8 * (second.makespan - first.makespan) > sum(second.busy) - sum(first.busy)


def test_overlapped_pairs_stay_pairs():
  rows = [["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "(0F3;0B1)OVERLAP_F_B", "0B2", "0B3"]]
  rows += [["1F0", "(1F1;1B0)OVERLAP_F_B", "(1F2;1B1)OVERLAP_F_B", "1F3", "1B2", "1B3"]]
  schedule = with_vocabulary(Schedule.from_tokens(rows), 1, Costs(head=2)).check()
  assert "(0F3;0B0)OVERLAP_F_B" in schedule.tokens()[0]
  assert {"(1F2;1B0)OVERLAP_F_B", "(1F3;1B1)OVERLAP_F_B"} <= set(schedule.tokens()[1])


def test_vocabulary_knows_one_and_two_barriers():
  with pytest.raises(ValueError, match="vocabulary=3; use 1 or 2"):
    with_vocabulary(make_schedule("1f1b", devices=2, microbatches=2), 3)


# Fillers.


def _idle(timeline):
  return len(timeline.busy) * timeline.makespan - sum(timeline.busy)


def _passes(timeline):
  """When everything but fillers runs."""
  rows = zip(timeline.schedule.order, timeline.start, timeline.end, strict=True)
  return [
    [cell for cell in zip(*row, strict=True) if cell[0].parts[0].kind is not Kind.Y] for row in rows
  ]


@pytest.mark.sampled("name, P, M", NAMED, 12)
def test_fillers_delay_nothing(name, P, M):
  schedule = _named(name, P, M)
  far = Costs(4, 4, 4, 3, filler=(1, 1))
  for costs in (Costs(filler=(1, 2)), far, UNEVEN, dataclasses.replace(UNEVEN, filler=(0, 30))):
    after = simulate(with_fillers(schedule, 2, costs), costs)
    assert _passes(after) == _passes(simulate(schedule, costs))


def test_fillers_wait_for_their_hop():
  # Device 0 idles for 13 from when device 1 is done with layer 0, one of them until it hears so.
  schedule = make_schedule("1f1b", devices=2, microbatches=1)
  costs = Costs(4, 4, 4, 1, filler=(5, 13))
  after = simulate(with_fillers(schedule, 2, costs), costs)
  assert _passes(after) == _passes(simulate(schedule, costs))
  assert after.makespan > simulate(schedule, costs).makespan


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b"])
def test_frozen_encoder_fills_the_bubbles(name):
  # Ten layers of equal times, together nine tenths of the time that P=4 devices idle at M=16.
  P, M, layers = 4, 16, 10
  schedule = make_schedule(name, devices=P, microbatches=M)
  before = simulate(schedule, Costs(40, 40, 40))
  costs = Costs(40, 40, 40, filler=0.9 * _idle(before) / M / layers)
  after = simulate(with_fillers(schedule, layers, costs), costs)
  assert before.bubble > 0.08
  assert after.bubble < 0.03
  assert after.makespan <= 1.02 * before.makespan


@pytest.mark.parametrize("filler", [3, (3, 1), (1, 3, 2)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h2"])
def test_fillers_in_bubbles_beat_fillers_at_the_end(name, filler):
  layers = 1 if filler == 3 else len(filler)
  costs = Costs(3, 3, 3, filler=filler)
  schedule = make_schedule(name, devices=4, microbatches=8)
  work = 8 * sum(filler if layers > 1 else [filler])
  after = simulate(with_fillers(schedule, layers, costs), costs)
  # The end of the step shared by all devices evenly is the best that the end could do.
  assert after.makespan < simulate(schedule, costs).makespan + work / 4


def test_fillers_that_fit_nowhere_are_shared_evenly():
  # One device after another is idle only before its first or after its last pass, and not for long.
  costs = Costs(filler=100)
  schedule = with_fillers(make_schedule("1f1b", devices=4, microbatches=8), 1, costs)
  assert [sum(step.kind is Kind.Y for step in row) for row in schedule.order] == [2, 2, 2, 2]


def test_fillers_need_layers_and_a_cost_for_each():
  schedule = make_schedule("1f1b", devices=2, microbatches=2)
  with pytest.raises(ValueError, match="layers=0"):
    with_fillers(schedule, 0)
  with pytest.raises(ValueError, match="filler lists 2"):
    with_fillers(schedule, 3, Costs(filler=(1, 2)))


# Post-validation.


@pytest.mark.parametrize("hop", [0, 1])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
@pytest.mark.sampled("P, M", list(itertools.product((1, 2, 3, 4, 6, 8), (1, 4, 9, 16))), 3)
def test_post_validation_keeps_the_span(name, hop, P, M):
  costs = Costs(3, 3, 3, hop)
  schedule = make_schedule(name, devices=P, microbatches=M)
  timeline = simulate(with_post_validation(schedule), costs)
  assert timeline.span == simulate(schedule, costs).span


def test_a_barrier_costs_what_post_validation_saves():
  P, M = 4, 12
  schedule = make_schedule("zb-h2", devices=P, microbatches=M)
  free = simulate(with_post_validation(schedule))
  # Behind a barrier nobody steps before the last device is done: the first one of all is device 0.
  barrier = max(row[-1] for row in simulate(schedule).end)
  assert barrier == 3 * M + P - 1
  # Without, the first device is done with its share when it has worked that off.
  assert free.span == 3 * M
  assert [row[-1] for row in free.end] == [3 * M + d for d in range(P)]


def test_updates_frame_the_backwards_of_every_device():
  schedule = with_post_validation(make_schedule("interleaved-1f1b", devices=2, microbatches=2))
  for d, row in enumerate(schedule.tokens()):
    backwards = [i for i, token in enumerate(row) if "B" in token]
    assert row[backwards[0] - 2 : backwards[0]] == [f"{d}U1", f"{2 + d}U1"]
    assert row[backwards[-1] + 1 :] == [f"{d}U0", f"{2 + d}U0"]


@pytest.mark.parametrize("name", ["zb-v", "hanayo", "interleaved-1f1b"])
def test_validation_of_several_chunks_per_device_costs_no_span(name):
  schedule = make_schedule(name, devices=4, microbatches=12)
  assert simulate(with_post_validation(schedule)).span == simulate(schedule).span
