"""Lowers a schedule to its tick table.

A schedule says in which order each device acts; the table adds on which tick, from and to which
slots, and what travels. An overlapped pair of a forward and a backward becomes two ticks. A gather
of weights is a tick where a mesh axis cuts the weights, and none where they lie whole; a release of
weights never is one, for the slot of the ring `weights` is free after the last action that reads
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxpipe.pipeline.table.program import CODE, RINGS, Doing, Program, find
from jaxpipe.pipeline.table.slots import LiveRange, Slots, colour
from jaxpipe.pipeline.table.stage_collectives import StageCollectives, barriers, find_collectives
from jaxpipe.pipeline.table.transfers import (
  Transfer,
  arrival_columns,
  find_routes,
  find_transfers,
  pairs_by_tick,
)
from jaxpipe.schedules import Action, Kind, Schedule, ScheduleError
from jaxpipe.schedules.ticks import ticks

# The actions that read the gathered weights of their stage. W is not among them, for it may come
# after their release: what it reads of the parameters stays gathered for the whole step.
_READS_WEIGHTS = (Kind.F, Kind.R, Kind.I, Kind.B)


def lower(
  schedule: Schedule,
  *,
  keeps_input: bool = False,
  slack: int = 0,
  gathers: bool = False,
  loss_gradient_waits: bool = True,
) -> Program:
  """Returns the tick table of a legal schedule.

  [1] Each action gets a device and a tick, as early as its inputs allow.
  [2] What F, I and B send is found, and with it when it arrives.
  [3] Everything that waits in a ring has a live range; colouring gives it a slot.
  [4] The columns are filled in.
  [5] What happens on each tick is summed up over the devices, for the compiler's sake.

  Args:
    schedule: a legal one, or the forward-only part of one.
    keeps_input: keep a stage's input until its R, or else its backward, which runs the forward
      again from it.
    slack: ticks that a transfer may take beyond the one that sends it, 0 or 1.
    gathers: whether weights are gathered where the schedule says so; else they lie whole, and its
      gathers are left out.
    loss_gradient_waits: whether the last stage's F ends with a head whose gradient waits for the
      backward, as with layers that are alike. A stage that has the head inside returns the loss,
      and its backward needs no gradient.

  Raises:
    ScheduleError: the schedule dead-locks, or has actions that the executor does not run.
    ValueError: another slack.
  """
  if slack not in (0, 1):
    raise ValueError(f"slack={slack} ticks cannot be executed; use 0 or 1")
  schedule = _flattened(schedule, (Kind.X,) if gathers else (Kind.G, Kind.X))
  _refuse_unknown(schedule)
  at = _at(schedule, slack)  # [1]
  weights = _gathers(schedule, slack) if gathers else []
  transfers = list(find_transfers(schedule, at))  # [2]
  routes = find_routes(transfers, schedule.devices)
  ranges = [  # [3]
    *_live_ranges(schedule, at, transfers, keeps_input, slack, loss_gradient_waits),
    *(one.live_range(at) for one in weights),
  ]
  slots = colour(ranges, RINGS)
  shape = (1 + max(tick for _, tick in at.values()) + slack, schedule.devices)
  table = _action_columns(schedule, at, weights, slots, shape)  # [4]
  table |= arrival_columns(transfers, routes, slots, shape, slack)
  collectives = find_collectives(schedule, at, slots, shape)
  pairs = pairs_by_tick(transfers, routes, shape, slack)
  return Program(
    schedule=schedule,
    at=at,
    slack=slack,
    keeps_input=keeps_input,
    slots=slots.count,
    routes=routes,
    doing=_doing(table, collectives, pairs),  # [5]
    collectives=collectives,
    table=table,
  )


def _flattened(schedule: Schedule, without: Sequence[Kind]) -> Schedule:
  """Returns the schedule with pairs as two actions, and without the kinds that take no tick.

  A device runs one stream of work, so a pair gains nothing but its transfers, and those run beside
  the next tick anyway. Two short ticks couple neighbours less than one long one.
  """
  return schedule.of_kinds([kind for kind in Kind if kind not in without])


def _refuse_unknown(schedule: Schedule) -> None:
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
  # One trace of the layer serves all microbatches: R recomputes for all of them, or I and B do.
  again = sum(a.kind is Kind.R for a in actions)
  forwards = sum(a.kind is Kind.F for a in actions)
  if again not in (0, forwards):
    raise ScheduleError(
      f"schedule {schedule.name} recomputes {again} of {forwards} forwards; give every F an R or"
      " none"
    )


def _tick_rows(schedule: Schedule, slack: int) -> Iterator[list[tuple[Action, int]]]:
  """Yields every device's actions in order, each with its tick."""
  for row, row_ticks in zip(schedule.order, ticks(schedule, slack), strict=True):
    yield [(a, t) for step, t in zip(row, row_ticks, strict=True) for a in step.parts]


def _at(schedule: Schedule, slack: int) -> dict[Action, tuple[int, int]]:
  """Returns action -> (device, tick), of all actions but gathers."""
  return {
    action: (d, tick)
    for d, row in enumerate(_tick_rows(schedule, slack))
    for action, tick in row
    if action.kind is not Kind.G
  }


@dataclasses.dataclass(frozen=True)
class _Gather:
  """One gather of a stage's weights, and the actions that read what it has gathered.

  A schedule may gather the weights of a stage twice for one unit of microbatches, for its forwards
  and again for its backwards. Both are then the same action (ZeroPP has `2G0` two times), so that
  gathers cannot be keys of a dict as other actions are, and each is an object.

  Attributes:
    action: the action, of kind G.
    device: the device that gathers: the one that holds the stage.
    tick: the tick on which it gathers, and fills a slot of the ring `weights`.
    readers: the actions of the stage on this device that read the slot: those between this gather
      and the next one of the stage.
  """

  action: Action
  device: int
  tick: int
  readers: list[Action]

  @property
  def value(self) -> tuple[int, int]:
    """The name of the gathered weights in the ring: stage, and tick of the gather."""
    return (self.action.stage, self.tick)

  def live_range(self, at: Mapping[Action, tuple[int, int]]) -> LiveRange:
    """Returns the live range of the gathered weights, from the gather to the last reader."""
    last = max([self.tick, *(at[action][1] for action in self.readers)])
    return LiveRange("weights", self.device, self.tick, last, self.value)


def _gathers(schedule: Schedule, slack: int) -> list[_Gather]:
  """Returns all gathers of a schedule, each with all its readers."""
  found = []
  for d, row in enumerate(_tick_rows(schedule, slack)):
    latest: dict[int, _Gather] = {}  # by stage
    for action, tick in row:
      if action.kind is Kind.G:
        latest[action.stage] = _Gather(action, d, tick, [])
        found.append(latest[action.stage])
      elif action.kind in _READS_WEIGHTS and action.stage in latest:
        latest[action.stage].readers.append(action)
  return found


def _live_ranges(
  schedule: Schedule,
  at: Mapping[Action, tuple[int, int]],
  transfers: Sequence[Transfer],
  keeps_input: bool,
  slack: int,
  loss_gradient_waits: bool,
) -> Iterator[LiveRange]:
  """Yields the live ranges of all that waits in a ring but weights.

  [1] A stage's input, from its arrival to F, or to the action that runs the forward again.
  [2] The gradient of a stage's output, from its arrival to I or B.
  [3] The last stage's output on a device that holds a shard of the head, from the collective that
      sends it there to T, or to the barrier where T does not follow.
  """
  arrival = {(one.gradient, one.stage, one.microbatch): one.arrives(slack) for one in transfers}
  barrier = barriers(at)
  for action, (d, tick) in at.items():
    s, m, kind = action.stage, action.microbatch, action.kind
    if kind is Kind.F:  # [1]
      start = arrival.get((False, s, m))
      if start is None and schedule.vocabulary:
        # A first stage's input is the sum over the embedding's shards, which is there at the
        # beginning of the tick: the slot must be free already at the end of the tick before.
        start = tick - 1
      if start is not None:  # else F of the first stage embeds
        again = find(at, Kind.R, s, m) or find(at, Kind.I, s, m)
        end = again[1] if keeps_input and again else tick
        yield LiveRange("activations", d, start, end, (s, m))
    if kind in (Kind.I, Kind.B):  # [2]
      start = arrival.get((True, s, m))
      if start is None and loss_gradient_waits:
        # At a last stage the gradient comes from the head: from F, which ends with the whole head,
        # or from the barrier of the head's shards.
        start = barrier.get(m, at[Action(s, Kind.F, m)][1])
      if start is not None:
        yield LiveRange("gradients", d, start, tick, (s, m))
    if kind is Kind.S:  # [3]
      # Within a tick y is stored in step [3] of `device.py`, and T of another microbatch reads its
      # own y in step [8]: counted from the tick before, the two never share a slot.
      start = at[Action(schedule.path(m)[-1], Kind.F, m)][1] - 1
      end = max(barrier[m], at.get(Action(s, Kind.T, m), (d, tick))[1])
      yield LiveRange("vocabulary", d, start, end, (m,))


def _action_columns(
  schedule: Schedule,
  at: Mapping[Action, tuple[int, int]],
  weights: Sequence[_Gather],
  slots: Slots,
  shape: tuple[int, int],
) -> dict[str, np.ndarray]:
  """Returns the columns that describe each device's own action, int32 [ticks, P] each."""
  columns = ("kind", "chunk", "stage", "microbatch", "first", "last")
  table = {name: np.zeros(shape, np.int32) for name in columns}
  table |= {ring: np.full(shape, slots.count[ring], np.int32) for ring in RINGS}
  for action, (d, tick) in at.items():
    s, m, cell = action.stage, action.microbatch, (tick, d)
    table["kind"][cell] = CODE[action.kind]
    table["microbatch"][cell] = m
    for ring, value in (("activations", (s, m)), ("gradients", (s, m)), ("vocabulary", (m,))):
      table[ring][cell] = slots.of(ring, d, value)
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
      table["weights"][tick, d] = slots.number["weights", d, one.value]
  return table


def _doing(
  table: Mapping[str, np.ndarray],
  collectives: StageCollectives,
  pairs: Sequence[tuple[frozenset[tuple[int, int]], ...]],
) -> tuple[Doing, ...]:
  """Sums up what happens on each tick over all devices."""
  kinds, first, last = table["kind"], table["first"] > 0, table["last"] > 0
  return tuple(
    Doing(
      kinds=frozenset(kinds[t].tolist()),
      first=frozenset(kinds[t][first[t]].tolist()),
      last=frozenset(kinds[t][last[t]].tolist()),
      pairs=pairs[t],
      collectives=frozenset(
        (column, bool(ms[t] >= 0)) for column, ms in collectives.microbatches.items()
      ),
    )
    for t in range(len(kinds))
  )
