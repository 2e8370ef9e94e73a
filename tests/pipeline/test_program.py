"""The tick table, interpreted with labels in place of arrays: every read finds what it should."""

import random

import numpy as np
import pytest

from jaxpipe.pipeline.program import CODE, IDLE, lower
from jaxpipe.schedules import (
  Action,
  Kind,
  Placement,
  Schedule,
  ScheduleError,
  make_schedule,
  simulate,
)
from jaxpipe.schedules.walk import dependencies

NAMES = {code: kind for kind, code in CODE.items()}


def interpret(program):
  """Runs the table on labels (what, stage, microbatch); returns the actions in tick order."""
  rings = [{} for _ in range(program.devices)]
  ran = []
  for t in range(program.ticks):
    sent = [None] * program.devices
    for d in range(program.devices):
      now = {name: int(column[t, d]) for name, column in program.table.items()}
      if now["kind"] == IDLE:
        continue
      kind, s, m = NAMES[now["kind"]], now["stage"], now["microbatch"]
      ran.append((t, d, Action(s, kind, m), now["chunk"]))
      sent[d] = act(program, rings[d], kind, s, m, now)
    for r, route in enumerate(program.routes):
      arrive(program, rings, sent, t, r, route)
  return ran


def act(program, ring, kind, s, m, now):
  def read(name, label):
    assert ring[name, now[name]] == label, (kind, s, m, name, ring[name, now[name]])

  if kind is Kind.F:
    if s > 0:
      read("activations", ("y", s - 1, m))
    ring["residuals", now["residuals"]] = ("kept", s, m)
    if s == program.stages - 1:
      ring["gradients", now["gradients"]] = ("dx", s + 1, m)
    return ("y", s, m)
  if kind is Kind.W:
    read("waiting", ("waiting", s, m))
    return None
  read("residuals", ("kept", s, m))
  read("gradients", ("dx", s + 1, m))
  if kind is Kind.I:
    ring["waiting", now["waiting"]] = ("waiting", s, m)
  return ("dx", s, m)


def arrive(program, rings, sent, t, r, route):
  for a, b in route.pairs:
    for what, name in (("activation", "activations"), ("gradient", "gradients")):
      slot = int(program.table[f"arriving_{what}_{r}"][t, b])
      if slot < program.slots[name]:
        rings[b][name, slot] = sent[a]


def check(schedule):
  program = lower(schedule)
  ran = interpret(program)
  for d, row in enumerate(schedule.order):
    assert [a for _, at, a, _ in ran if at == d] == list(row)
  for _, d, action, chunk in ran:
    home = schedule.placement
    assert (home.device(action.stage), home.chunk(d, action.stage)) == (d, chunk)
  return program


def test_1f1b_as_a_literal_table():
  program = lower(make_schedule("1f1b", devices=2, microbatches=3))
  assert program.table["kind"].T.tolist() == [[1, 1, 0, 2, 1, 2, 0, 2], [0, 1, 2, 1, 2, 1, 2, 0]]
  assert program.table["microbatch"].T.tolist() == [
    [0, 1, 0, 0, 2, 1, 0, 2],
    [0, 0, 0, 1, 1, 2, 2, 0],
  ]
  assert program.slots == {"activations": 1, "residuals": 2, "gradients": 1, "waiting": 0}
  (route,) = program.routes  # with two devices both directions are one exchange
  assert route.pairs == ((0, 1), (1, 0)) and route.activations and route.gradients


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("backward", ["fused", "split"])
def test_every_read_finds_what_it_should(name, backward):
  for P in (1, 2, 3, 4, 8):
    for M in (1, 2, P - 1, P, P + 1, 3 * P + 1):
      if M:
        schedule = make_schedule(name, devices=P, microbatches=M, backward=backward)
        program = check(schedule)
        # Ticks of one action each; the simulator's ring lengths are the table's.
        timeline = simulate(schedule)
        assert program.slots["residuals"] <= max(timeline.peak_activations)
        assert program.slots["waiting"] == max(timeline.peak_pending_weight_grads)


def test_1f1b_keeps_p_microbatches_and_gpipe_all():
  for M in (8, 16, 32):
    assert lower(make_schedule("1f1b", devices=4, microbatches=M)).slots["residuals"] == 4
    assert lower(make_schedule("gpipe", devices=4, microbatches=M)).slots["residuals"] == M


def random_schedule(seed):
  """Any legal order: devices take turns at random, doing whatever has become possible."""
  draw = random.Random(seed)
  P, V, M = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 5)
  placement = Placement.v(P) if V == 2 and draw.random() < 0.5 else Placement.loop(P, V)
  S = placement.stages
  todo = set()
  for s in range(S):
    for m in range(M):
      kinds = (Kind.F, Kind.B) if draw.random() < 0.5 else (Kind.F, Kind.I, Kind.W)
      todo |= {Action(s, kind, m) for kind in kinds}
  done, order = set(), [[] for _ in range(P)]
  blank = Schedule("blank", placement, M, ())
  while todo:
    ready = [a for a in todo if all(need in done for need in dependencies(a, blank))]
    action = draw.choice(sorted(ready, key=str))
    todo.remove(action)
    done.add(Action(action.stage, Kind.I, action.microbatch) if action.kind is Kind.B else action)
    order[placement.device(action.stage)].append(action)
  return Schedule("random", placement, M, tuple(map(tuple, order))).check()


@pytest.mark.parametrize("seed", range(60))
def test_any_legal_order_on_any_placement(seed):
  check(random_schedule(seed))


def test_forward_only_programs_keep_nothing():
  program = lower(make_schedule("1f1b", devices=4, microbatches=6).forward_only())
  assert program.slots["residuals"] == program.slots["gradients"] == 0
  assert program.kinds == {Kind.F}
  assert not any(route.gradients for route in program.routes)


def test_kinds_that_cannot_run_are_named():
  schedule = make_schedule("1f1b", devices=1, microbatches=1)
  order = ((*schedule.order[0][:1], Action(0, Kind.R, 0), *schedule.order[0][1:]),)
  with pytest.raises(ScheduleError, match=r"actions of kind R, which the executor does not run"):
    lower(Schedule("custom", schedule.placement, 1, order))


def test_the_interpreter_sees_a_slot_given_twice():
  program = lower(make_schedule("gpipe", devices=2, microbatches=3))
  program.table["residuals"][:] = np.minimum(program.table["residuals"], 1)
  with pytest.raises(AssertionError):
    interpret(program)
