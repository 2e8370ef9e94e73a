"""The tick table, interpreted with labels in place of arrays: every read finds what it should."""

import random

import numpy as np
import pytest

from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.program import CODE, IDLE, Value
from jaxpipe.schedules import (
  Action,
  Kind,
  Placement,
  Schedule,
  ScheduleError,
  make_schedule,
  schedule_names,
  simulate,
)
from jaxpipe.schedules.transforms.recompute import with_recompute
from jaxpipe.schedules.transforms.vocabulary import with_vocabulary
from jaxpipe.schedules.walk import dependencies

NAMES = {code: kind for kind, code in CODE.items()}


# What a layer leaves: for I, for W, and from I to W, all of one size.
VALUES = [Value(0, Kind.F, Kind.I), Value(0, Kind.F, Kind.W), Value(0, Kind.I, Kind.W)]
# The same where R makes what F does not keep.
AGAIN = [Value(0, Kind.R, Kind.I), Value(0, Kind.R, Kind.W), Value(0, Kind.I, Kind.W)]


def interpret(program, values=VALUES):
  """Runs the table on labels; returns the actions in tick order."""
  P, length = program.schedule.devices, program.length
  cells, _ = program.cells(values)
  rings = [{} for _ in range(P)]
  ran, flying = [], [None] * P
  for t in range(program.ticks):
    sent = [None] * P
    for d in range(P):
      now = {name: int(column[t, d]) for name, column in program.table.items()}
      if now["kind"] != IDLE:
        kind, s, m = NAMES[now["kind"]], now["stage"], now["microbatch"]
        ran.append((t, d, Action(s, kind, m), now["chunk"]))
        sent[d] = act(program, rings[d], Action(s, kind, m), now, cells[t, d], values)
    away = flying if program.slack else sent
    for r, route in enumerate(program.routes):
      for a, b in program.doing[t].pairs[r]:
        for what, name in (("activation", "activations"), ("gradient", "gradients")):
          slot = int(program.table[f"arriving_{what}_{r}"][t, b])
          if slot < length(name) - 1:
            rings[b][name, slot] = (away if route.offset else sent)[a]
    flying = sent
  return ran


def act(program, ring, action, now, cells, values):
  s, kind, m = action.stage, action.kind, action.microbatch
  if kind is Kind.G:
    ring["weights", now["weights"]] = s
    return None
  if program.gathers and kind in (Kind.F, Kind.R, Kind.I, Kind.B):
    assert ring["weights", now["weights"]] == s
  path = program.schedule.path(m)
  assert (now["first"], now["last"]) == (s == path[0], s == path[-1])

  def read(name, slot, label):
    assert ring[name, slot] == label, (str(action), name, ring[name, slot])

  if kind in readers_of_the_input(program) and not now["first"]:
    read("activations", now["activations"], ("y", path[path.index(s) - 1], m))
  if kind in (Kind.I, Kind.B):
    after = None if now["last"] else path[path.index(s) + 1]
    read("gradients", now["gradients"], ("dx", after, m))
  users = {Kind.B: (Kind.I, Kind.W), Kind.I: (Kind.I, Kind.W), Kind.W: (Kind.W,)}
  for n, value in enumerate(values):
    used = value.last in users.get(kind, ()) and value.made is not kind
    if used and not (value.made is Kind.I and kind is Kind.B):
      read("pool", int(cells[n]), (n, s, m))
  for n, value in enumerate(values):
    if value.made is kind:
      ring["pool", int(cells[n])] = (n, s, m)
  if kind is Kind.F and now["last"]:
    ring["gradients", now["gradients"]] = ("dx", None, m)
  return {Kind.F: ("y", s, m), Kind.I: ("dx", s, m), Kind.B: ("dx", s, m)}.get(kind)


def readers_of_the_input(program):
  if not program.keeps_input:
    return (Kind.F,)
  return (Kind.F, Kind.R) if Kind.R in program.kinds else (Kind.F, Kind.I, Kind.B)


def check(schedule, **options):
  again = any(a.kind is Kind.R for row in schedule.order for step in row for a in step.parts)
  program = lower(schedule, **options)
  ran = interpret(program, AGAIN if again else VALUES)
  for d, row in enumerate(schedule.order):
    left_out = (Kind.X,) if program.gathers else (Kind.G, Kind.X)
    parts = [a for step in row for a in step.parts if a.kind not in left_out]
    assert [a for _, at, a, _ in ran if at == d] == parts
  for _, d, action, chunk in ran:
    assert schedule.placement.stage(d, chunk) == action.stage
  return program


def test_1f1b_as_a_literal_table():
  program = lower(make_schedule("1f1b", devices=2, microbatches=3))
  assert program.table["kind"].T.tolist() == [[1, 1, 0, 3, 1, 3, 0, 3], [0, 1, 3, 1, 3, 1, 3, 0]]
  assert program.table["microbatch"].T.tolist() == [
    [0, 1, 0, 0, 2, 1, 0, 2],
    [0, 0, 0, 1, 1, 2, 2, 0],
  ]
  assert program.slots == {"activations": 1, "gradients": 1, "vocabulary": 0, "weights": 0}
  (route,) = program.routes  # with two devices both directions are one exchange
  assert route.activations and route.gradients
  assert program.doing[0].pairs == (frozenset({(0, 1)}),)
  assert program.doing[4].pairs == (frozenset({(0, 1), (1, 0)}),)


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("P, M, V", [(1, 2, 2), (2, 4, 2), (4, 9, 3)])
def test_weights_are_gathered_once_a_unit_and_held_until_released(P, M, V, slack):
  schedule = make_schedule("zeropp", devices=P, microbatches=M, chunks=V, unit=4)
  program = check(schedule, gathers=True, slack=slack)
  gathers = (program.table["kind"] == CODE[Kind.G]).sum(axis=0)
  assert set(gathers.tolist()) == {2 * V * -(-M // 4)}
  # A block's weights are released before the next block's are gathered.
  assert program.slots["weights"] == 1


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
        waiting = [Value(0, Kind.I, Kind.W)]
        assert program.cells(VALUES[:1])[1][0] <= max(timeline.peak_activations)
        assert program.cells(waiting)[1][0] == max(timeline.peak_pending_weight_grads)


def test_1f1b_keeps_p_microbatches_and_gpipe_all():
  for M in (8, 16, 32):
    for name, peak in (("1f1b", 4), ("gpipe", M)):
      program = lower(make_schedule(name, devices=4, microbatches=M))
      assert program.cells(VALUES[1:2])[1] == (peak,)


def test_what_w_waits_for_takes_the_cells_of_what_i_consumed():
  """ZB-H1 holds P chunks from F to W: one cell more for each I would be P more in all."""
  program = lower(make_schedule("zb-h1", devices=4, microbatches=16))
  kept_for_i, waiting = VALUES[0], VALUES[2]
  assert program.cells([kept_for_i, waiting])[1] == (4,)


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("keeps_input", [False, True])
def test_every_registered_schedule_reads_what_it_should(name, slack, keeps_input):
  for P, M in ((2, 4), (4, 4), (4, 10)):
    check(make_schedule(name, devices=P, microbatches=M), slack=slack, keeps_input=keeps_input)


@pytest.mark.parametrize("keeps_input", [False, True])
def test_recomputed_schedules_read_what_r_made(keeps_input):
  for name in ("gpipe", "1f1b", "zb-v", "chimera"):
    schedule = with_recompute(make_schedule(name, devices=4, microbatches=8))
    check(schedule, keeps_input=keeps_input)


def test_a_recompute_for_some_forwards_only_is_refused():
  rows = [["0F0", "0R0", "0F1", "0B0", "0B1"]]
  with pytest.raises(ScheduleError, match=r"recomputes 1 of 2 forwards; give every F an R"):
    lower(Schedule.from_tokens(rows))


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
  assert program.slots["gradients"] == 0 and program.cells(VALUES)[1] == (0,)
  assert program.kinds == {Kind.F}
  assert not any(route.gradients for route in program.routes)


def test_kinds_that_cannot_run_are_named():
  schedule = make_schedule("1f1b", devices=2, microbatches=2)
  with pytest.raises(ScheduleError, match=r"vocabulary=2 barriers, and the executor runs one"):
    lower(with_vocabulary(schedule, barriers=2))


def test_the_interpreter_sees_a_slot_given_twice():
  program = lower(make_schedule("gpipe", devices=2, microbatches=3))
  program.table["gradients"][:] = np.minimum(program.table["gradients"], 1)
  with pytest.raises((AssertionError, KeyError)):
    interpret(program)
