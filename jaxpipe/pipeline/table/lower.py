"""Lowers a schedule to its tick table.

A pair of a forward and a backward is two ticks. A gather of weights is one where a mesh axis cuts
them, and none where they lie whole; a release is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxpipe.pipeline.table.meetings import Meetings, barriers, find_meetings
from jaxpipe.pipeline.table.program import CODE, RINGS, Doing, Program, Route, find
from jaxpipe.pipeline.table.slots import Stay, colour
from jaxpipe.schedules import Action, Kind, Schedule, ScheduleError
from jaxpipe.schedules.ticks import ticks

# What reads the weights of its stage.
_READS_WEIGHTS = (Kind.F, Kind.R, Kind.I, Kind.B)


def lower(
  schedule: Schedule,
  *,
  keeps_input: bool = False,
  slack: int = 0,
  gathers: bool = False,
  head_apart: bool = True,
) -> Program:
  """Returns the program of a legal schedule.

  Args:
    schedule: a legal one, or the forward-only part of one.
    keeps_input: keep a stage's input until its R, or else its backward.
    slack: ticks that a transfer may take beyond the one that sends it, 0 or 1.
    gathers: whether weights are gathered where the schedule says so; else they lie whole.
    head_apart: whether the last stage's F ends with a head whose gradient waits for the backward;
      a stage that has the head inside returns the loss.

  Raises:
    ScheduleError: the schedule dead-locks, or has actions that the executor does not run.
    ValueError: another slack.
  """
  if slack not in (0, 1):
    raise ValueError(f"slack={slack} ticks cannot be executed; use 0 or 1")
  schedule = _in_ticks(schedule, (Kind.X,) if gathers else (Kind.G, Kind.X))
  _refuse_strange(schedule)
  at = _at(schedule, slack)
  sends = list(_sends(schedule, at))
  # A list: what reads them is known once the last has been found.
  weights = list(_gathers(schedule, slack)) if gathers else []
  stays = [
    *_stays(schedule, at, sends, keeps_input, slack, head_apart),
    *(one.stay(at) for one in weights),
  ]
  slot, slots = colour(stays, RINGS)
  routes = _routes(schedule.devices, sends)
  shape = (1 + max(tick for _, tick in at.values()) + slack, schedule.devices)
  table = _actions(schedule, at, weights, slot, np.zeros(shape, np.int32), slots)
  table |= _arrivals(sends, slot, routes, np.zeros(shape, np.int32), slots, slack)
  meetings = find_meetings(schedule, at, slot, shape, slots)
  return Program(
    schedule=schedule,
    at=at,
    slack=slack,
    keeps_input=keeps_input,
    slots=slots,
    routes=routes,
    doing=_doing(table, meetings, sends, routes, slack),
    meetings=meetings,
    table=table,
  )


@dataclasses.dataclass(frozen=True)
class _Gather:
  """One G, which may stand in a schedule more than once, and what reads the weights it gathers.

  Attributes:
    action: the G.
    device, tick: where and when.
    readers: the actions until the stage's next G.
  """

  action: Action
  device: int
  tick: int
  readers: list[Action]

  def stay(self, at: Mapping[Action, tuple[int, int]]) -> Stay:
    """The stage's weights in their ring."""
    last = max([self.tick, *(at[action][1] for action in self.readers)])
    return Stay("weights", self.device, self.tick, last, (self.action.stage, self.tick))


def _gathers(schedule: Schedule, slack: int) -> Iterator[_Gather]:
  for d, row in enumerate(_tick_rows(schedule, slack)):
    held: dict[int, _Gather] = {}
    for action, tick in row:
      if action.kind is Kind.G:
        held[action.stage] = _Gather(action, d, tick, [])
        yield held[action.stage]
      elif action.kind in _READS_WEIGHTS and action.stage in held:
        held[action.stage].readers.append(action)


def _tick_rows(schedule: Schedule, slack: int) -> Iterator[list[tuple[Action, int]]]:
  """Every device's actions, and their ticks."""
  for row, row_ticks in zip(schedule.order, ticks(schedule, slack), strict=True):
    yield [(a, t) for step, t in zip(row, row_ticks, strict=True) for a in step.parts]


def _in_ticks(schedule: Schedule, without: Sequence[Kind]) -> Schedule:
  """Overlapped pairs as their parts, one after the other, and nothing that takes no tick.

  One device runs one stream: a pair gains nothing beyond the transfers, and those run beside the
  next tick anyway. Two short ticks couple neighbours less than one long one.
  """
  order = tuple(
    tuple(a for step in row for a in step.parts if a.kind not in without) for row in schedule.order
  )
  return dataclasses.replace(schedule, order=order)


def _refuse_strange(schedule: Schedule) -> None:
  """Raises ScheduleError for what the executor does not run."""
  actions = [a for row in schedule.order for step in row for a in step.parts]
  kinds = sorted({a.kind.value for a in actions} - {k.value for k in CODE})
  if kinds:
    raise ScheduleError(
      f"schedule {schedule.name} has actions of kind {', '.join(kinds)}, which the"
      f" executor does not run; it runs {', '.join([*CODE, Kind.X])}"
    )
  if schedule.vocabulary > 1:
    raise ScheduleError(
      f"schedule {schedule.name} has vocabulary={schedule.vocabulary} barriers, and the executor"
      " runs one: its S pass finds the input gradient too; use vocabulary=1"
    )
  again = sum(a.kind is Kind.R for a in actions)
  forwards = sum(a.kind is Kind.F for a in actions)
  if again not in (0, forwards):
    raise ScheduleError(
      f"schedule {schedule.name} recomputes {again} of {forwards} forwards; give every F an R or"
      " none"
    )


def _at(schedule: Schedule, slack: int) -> dict[Action, tuple[int, int]]:
  """Device and tick of each action but gathers."""
  return {
    action: (d, tick)
    for d, row in enumerate(_tick_rows(schedule, slack))
    for action, tick in row
    if action.kind is not Kind.G
  }


@dataclasses.dataclass(frozen=True)
class _Send:
  """An output or an input gradient on its way to the next stage.

  Attributes:
    gradient: whether it is a gradient.
    tick: at whose end it leaves.
    source, target: devices.
    stage, microbatch: of the action that it is for.
  """

  gradient: bool
  tick: int
  source: int
  target: int
  stage: int
  microbatch: int

  def arrives(self, slack: int) -> int:
    """The tick at whose end it is in its slot; within a device nothing travels."""
    return self.tick + (slack if self.source != self.target else 0)


def _sends(schedule: Schedule, at: Mapping[Action, tuple[int, int]]) -> Iterator[_Send]:
  for action, (d, tick) in at.items():
    s, m = action.stage, action.microbatch
    gradient = action.kind in (Kind.I, Kind.B)
    if action.kind is not Kind.F and not gradient:
      continue
    path = schedule.path(m)
    i = path.index(s) + (-1 if gradient else 1)
    if 0 <= i < len(path):
      target = find(at, Kind.I if gradient else Kind.F, path[i], m)
      assert target is not None  # a legal schedule passes every stage of the path
      yield _Send(gradient, tick, d, target[0], path[i], m)


def _stays(
  schedule: Schedule,
  at: Mapping[Action, tuple[int, int]],
  sends: Sequence[_Send],
  keeps_input: bool,
  slack: int,
  head_apart: bool,
) -> Iterator[Stay]:
  """What the rings hold: the saved values have cells of their own."""
  arrival = {(send.gradient, send.stage, send.microbatch): send.arrives(slack) for send in sends}
  met = barriers(at)
  for action, (d, tick) in at.items():
    s, m, kind = action.stage, action.microbatch, action.kind
    if kind is Kind.F:
      start = arrival.get((False, s, m))
      if start is None and schedule.vocabulary:
        start = tick - 1  # the shards of the embedding meet at the beginning of the tick
      if start is not None:  # else the first stage embeds
        again = find(at, Kind.R, s, m) or find(at, Kind.I, s, m)
        end = again[1] if keeps_input and again else tick
        yield Stay("activations", d, start, end, (s, m))
    if kind in (Kind.I, Kind.B):
      start = arrival.get((True, s, m))
      if start is None and head_apart:
        # At the last stage, F ends with the head, which leaves dy; or all shards of it do.
        start = met.get(m, at[Action(s, Kind.F, m)][1])
      if start is not None:
        yield Stay("gradients", d, start, tick, (s, m))
    if kind is Kind.S:
      # y comes in the middle of the tick, before T of another microbatch reads its own.
      start = at[Action(schedule.path(m)[-1], Kind.F, m)][1] - 1
      end = max(met[m], at.get(Action(s, Kind.T, m), (d, tick))[1])
      yield Stay("vocabulary", d, start, end, (m,))


def _routes(devices: int, sends: Iterable[_Send]) -> tuple[Route, ...]:
  travels: dict[int, set[bool]] = {}
  for send in sends:
    travels.setdefault((send.target - send.source) % devices, set()).add(send.gradient)
  return tuple(
    Route(offset, activations=False in what, gradients=True in what)
    for offset, what in sorted(travels.items())
  )


def _actions(
  schedule: Schedule,
  at: Mapping[Action, tuple[int, int]],
  weights: Sequence[_Gather],
  slot: Mapping[Hashable, int],
  zeros: np.ndarray,
  slots: Mapping[str, int],
) -> dict[str, np.ndarray]:
  columns = ("kind", "chunk", "stage", "microbatch", "first", "last")
  table = {name: zeros.copy() for name in columns}
  table |= {ring: np.full_like(zeros, slots[ring]) for ring in RINGS}
  for action, (d, tick) in at.items():
    s, m, cell = action.stage, action.microbatch, (tick, d)
    table["kind"][cell] = CODE[action.kind]
    table["microbatch"][cell] = m
    for ring, what in (("activations", (s, m)), ("gradients", (s, m)), ("vocabulary", (m,))):
      table[ring][cell] = slot.get((ring, d, what), slots[ring])
    if action.kind in (Kind.S, Kind.T):
      continue  # their number is a shard's, not a stage's
    path = schedule.path(m)
    table["stage"][cell] = s
    table["chunk"][cell] = schedule.placement.chunk(d, s)
    table["first"][cell] = s == path[0]
    table["last"][cell] = s == path[-1]
  for one in weights:
    d, s, cell = one.device, one.action.stage, (one.tick, one.device)
    table["kind"][cell], table["stage"][cell] = CODE[Kind.G], s
    table["microbatch"][cell] = one.action.microbatch
    table["chunk"][cell] = schedule.placement.chunk(d, s)
    for tick in (one.tick, *(at[action][1] for action in one.readers)):
      table["weights"][tick, d] = slot["weights", d, (s, one.tick)]
  return table


def _arrivals(
  sends: Iterable[_Send],
  slot: Mapping[Hashable, int],
  routes: tuple[Route, ...],
  zeros: np.ndarray,
  slots: Mapping[str, int],
  slack: int,
) -> dict[str, np.ndarray]:
  table = {}
  for r in range(len(routes)):
    table[f"arriving_activation_{r}"] = np.full_like(zeros, slots["activations"])
    table[f"arriving_gradient_{r}"] = np.full_like(zeros, slots["gradients"])
  number = {route.offset: r for r, route in enumerate(routes)}
  for send in sends:
    r = number[(send.target - send.source) % zeros.shape[1]]
    what, ring = ("gradient", "gradients") if send.gradient else ("activation", "activations")
    cell = (send.arrives(slack), send.target)
    table[f"arriving_{what}_{r}"][cell] = slot[ring, send.target, (send.stage, send.microbatch)]
  return table


def _doing(
  table: Mapping[str, np.ndarray],
  meetings: Meetings,
  sends: Iterable[_Send],
  routes: tuple[Route, ...],
  slack: int,
) -> tuple[Doing, ...]:
  number = {route.offset: r for r, route in enumerate(routes)}
  ticks, P = table["kind"].shape
  pairs: list[list[set[tuple[int, int]]]] = [[set() for _ in routes] for _ in range(ticks)]
  for send in sends:
    r = number[(send.target - send.source) % P]
    pairs[send.arrives(slack)][r].add((send.source, send.target))
  return tuple(
    Doing(
      kinds=frozenset(table["kind"][t].tolist()),
      first=frozenset(table["kind"][t][table["first"][t] > 0].tolist()),
      last=frozenset(table["kind"][t][table["last"][t] > 0].tolist()),
      pairs=tuple(map(frozenset, pairs[t])),
      meetings=frozenset((name, bool(ms[t] >= 0)) for name, ms in meetings.microbatches.items()),
    )
    for t in range(ticks)
  )
