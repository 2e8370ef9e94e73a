"""The dependencies between actions, and a walk through a schedule in an order that keeps them.

Checking, simulating and assigning ticks are all the same walk: devices work through their lists in
order, and an action waits until the products that it needs exist. The walk visits every action once
and wakes a device only when the product that it waits for appears, so it is linear in the number of
actions.

  awake: [1]   device 0: 0F0 0F1 [0B0] 0B1        [2] the head, and what it still misses
  devices      device 1: 1F0 [1B0] 1F1 1B1        [3] sleepers: {slot of 1I0: [device 0]}
  to look at   order, heads in brackets           [4] running 1B0 makes 1I0 and wakes device 0
"""

import dataclasses
from collections.abc import Iterator

from jaxpipe.schedules.actions import Action, ScheduleError, Step
from jaxpipe.schedules.kinds import PRODUCTS, Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.protocol import OrderedActions

# Numbers of the kinds of product that other actions wait for. Every wait is for products of the
# action's own microbatch.
_RANK = {kind: i for i, kind in enumerate(kind for kind in Kind if kind.info.awaited)}
# Products that an action needs or makes, as (kind, number before the letter) pairs.
_Products = tuple[tuple[Kind, int], ...]


@dataclasses.dataclass(frozen=True)
class _Flow:
  """The dependencies between the actions of one microbatch.

  Attributes:
    path: the stages that the microbatch visits, in order.
    vocabulary: barriers round the output layer, 0 where the last stage holds it whole.
    placement: which devices there are, for the vocabulary's shards and the optimizer's chain.
    microbatch: 0, or 1 for any later one: it tells the optimizer's step, U0, from its validation,
      U1, and all other dependencies are the same for every microbatch.
  """

  path: tuple[int, ...]
  vocabulary: int
  placement: Placement
  microbatch: int

  def needs(self, kind: Kind, number: int) -> _Products:
    """Returns the products that an action waits for, by its kind and the number before it."""
    if kind is Kind.F:
      return self._beside(Kind.F, number, -1)
    if kind is Kind.W:
      return ((Kind.I, number),)
    if kind is Kind.R:
      return ((Kind.F, number),)
    if kind in (Kind.I, Kind.B):
      if number == self.path[-1]:
        return ((Kind.F, number), *self._loss())
      return ((Kind.F, number), *self._beside(Kind.I, number, +1))
    return self._needs_of_the_rest(kind, number)

  def _needs_of_the_rest(self, kind: Kind, number: int) -> _Products:
    """Returns the products that an action which is no pass through a stage waits for."""
    if kind is Kind.S:
      # The last stage's activation is broadcast to all shards.
      return ((Kind.F, self.path[-1]),)
    if kind is Kind.T:
      return self._all_shards(Kind.S)
    if kind is Kind.Y:
      return ((Kind.Y, number - 1),) if number else ()
    if kind is Kind.U:
      # Step: partial sums come down the devices. Validate: the whole sum goes back up.
      d = self.placement.device(number)
      other = d - 1 if self.microbatch == 0 else d + 1
      row = self.placement.table[other] if 0 <= other < self.placement.devices else ()
      return tuple((Kind.U, stage) for stage in row)
    return ()  # weights are gathered at any time

  def _beside(self, kind: Kind, stage: int, step: int) -> _Products:
    """Returns the product of the stage before (-1) or after (+1) on the path, if there is one."""
    i = self.path.index(stage) + step
    return ((kind, self.path[i]),) if 0 <= i < len(self.path) else ()

  def _loss(self) -> _Products:
    """Returns the products that the last stage's backward needs beside its own forward."""
    if self.vocabulary == 0:
      return ()
    return self._all_shards(Kind.S if self.vocabulary == 1 else Kind.T)

  def _all_shards(self, kind: Kind) -> _Products:
    """Returns the products of one kind on every shard of the vocabulary."""
    return tuple((kind, shard) for shard in range(self.placement.devices))


def _flow(schedule: OrderedActions, microbatch: int) -> _Flow:
  """Returns the dependencies of a microbatch; microbatches that flow alike give equal values."""
  path = schedule.path(microbatch)
  return _Flow(path, schedule.vocabulary, schedule.placement, min(microbatch, 1))


def dependencies(action: Action, schedule: OrderedActions) -> tuple[Action, ...]:
  """Returns the actions that an action waits for.

  Args:
    action: any action of the schedule, or one that could be.
    schedule: gives the path of the action's microbatch.

  Returns:
    The actions it needs, its own stage's first. An input gradient is named `I`, whether the
    schedule produces it by an `I` or by a fused `B`.

  >>> from jaxpipe.schedules import make_schedule
  >>> gpipe = make_schedule("gpipe", devices=4, microbatches=1)
  >>> [str(needed) for needed in dependencies(Action.parse("2B0"), gpipe)]
  ['2F0', '3I0']
  """
  needed = _flow(schedule, action.microbatch).needs(action.kind, action.stage)
  return tuple(Action(stage, kind, action.microbatch) for kind, stage in needed)


# Slots number the awaited products, so that the walk looks integers up and not tuples. Within one
# kind and number the microbatch is added, hence the wide steps.
_PER_NUMBER = 1 << 24
_PER_KIND = 1 << 48


def _base(kind: Kind, number: int) -> int:
  """Returns the slot of a product for microbatch 0."""
  return _RANK[kind] * _PER_KIND + number * _PER_NUMBER


# The products that an action needs and those that it makes, as slots for microbatch 0.
_Bases = tuple[tuple[int, ...], tuple[int, ...]]


class _Waits:
  """The slots that each action needs and makes, computed when they are first asked for."""

  def __init__(self, schedule: OrderedActions) -> None:
    self._schedule = schedule
    # Microbatches that flow alike share a table.
    self._tables: dict[_Flow, dict[Kind, dict[int, _Bases]]] = {}
    self._of: dict[int, dict[Kind, dict[int, _Bases]]] = {}

  def slots(self, action: Action) -> tuple[list[int], list[int]]:
    """Returns the slots of the products that an action needs, and of those that others await."""
    m = action.microbatch
    try:
      needs, makes = self._of[m][action.kind][action.stage]
    except KeyError:
      needs, makes = self._enter(action)
    return [base + m for base in needs], [base + m for base in makes]

  def _enter(self, action: Action) -> _Bases:
    """Computes the slots of an action that is looked up for the first time."""
    flow = _flow(self._schedule, action.microbatch)
    table = self._tables.setdefault(flow, {kind: {} for kind in Kind})
    self._of[action.microbatch] = table
    if action.stage not in table[action.kind]:
      table[action.kind][action.stage] = (
        tuple(_base(*product) for product in flow.needs(action.kind, action.stage)),
        tuple(_base(kind, action.stage) for kind in PRODUCTS[action.kind] if kind in _RANK),
      )
    return table[action.kind][action.stage]


@dataclasses.dataclass(slots=True)
class Visit:
  """One step of a device's list, in an order in which all that it needs comes before it.

  Attributes:
    device: the device that runs it.
    step: the action or overlapped pair.
    needs: slots of the products that it waits for; a slot is the number of one product of one
      microbatch, the same in all visits.
    makes: slots of its products that others wait for.
  """

  device: int
  step: Step
  needs: list[int]
  makes: list[int]


def walk(schedule: OrderedActions) -> Iterator[Visit]:
  """Visits every step of a schedule after all that it waits for.

  Args:
    schedule: lists for all devices, and the paths of the microbatches.

  Yields:
    The visits; each device's come in the order of its list.

  Raises:
    ScheduleError: the schedule dead-locks.
  """
  order = schedule.order
  waits = _Waits(schedule)
  done: set[int] = set()
  heads = [0] * len(order)
  sleepers: dict[int, list[int]] = {}
  awake = list(range(len(order)))[::-1]  # [1]
  while awake:
    d = awake.pop()
    row = order[d]
    while heads[d] < len(row):
      step = row[heads[d]]
      if isinstance(step, Action):
        needs, makes = waits.slots(step)
      else:
        parts = [waits.slots(part) for part in step.parts]
        needs = [slot for part in parts for slot in part[0]]
        makes = [slot for part in parts for slot in part[1]]
      # [2] The first missing one is enough: when it appears, the head is looked at again.
      for slot in needs:
        if slot not in done:
          break
      else:
        yield Visit(d, step, needs, makes)
        # The head moves after the yield: while the caller handles a step, it is not done yet.
        heads[d] += 1
        for slot in makes:
          done.add(slot)
          # [4] Only now, so that nobody is woken for what the caller has not recorded.
          if slot in sleepers:
            awake += sleepers.pop(slot)
        continue
      # [3] Several devices may wait for one product.
      sleepers.setdefault(slot, []).append(d)
      break
  if any(head < len(row) for head, row in zip(heads, order, strict=True)):
    raise _deadlock(schedule, heads)


def _deadlock(schedule: OrderedActions, heads: list[int]) -> ScheduleError:
  """Says which action can never run and what it waits for."""
  order = schedule.order
  # Only what is left can block; what has run is neither searched nor named.
  makers = {
    (product, action.stage, action.microbatch): (d, step)
    for d, row in enumerate(order)
    for step in row[heads[d] :]
    for action in step.parts
    for product in PRODUCTS[action.kind]
  }

  def blocker(d: int) -> tuple[int, Step] | None:
    """Returns the device and step that device d's next step waits for; None if no step is left."""
    for action in order[d][heads[d]].parts:
      for needed in dependencies(action, schedule):
        found = makers.get((needed.kind, needed.stage, needed.microbatch))
        if found is not None:
          return found
    return None

  # Many devices sleep in a dead-lock, most of them only behind others. Following who waits for
  # whom must end in a cycle; its first action is the cause, the rest are consequences.
  blocked: dict[int, tuple[int, Step]] = {}
  d = next(d for d, row in enumerate(order) if heads[d] < len(row))
  while d not in blocked:
    found = blocker(d)
    if found is None:
      # Only where nobody has checked: `check` reports what is missing before anybody waits for it.
      return ScheduleError(f"{order[d][heads[d]]} on device {d} waits for what no device makes")
    blocked[d] = found
    d = found[0]
  cycle = list(blocked)[list(blocked).index(d) :]
  d = min(cycle, key=lambda d: (heads[d], d))
  home, maker = blocked[d]
  step = order[d][heads[d]]
  if maker is step:
    where = "which is the same step"
  elif home == d:
    where = "which stands later in the same list"
  elif maker == order[home][heads[home]]:
    where = f"which cannot run on device {home} either"
  else:
    where = f"which stands behind {order[home][heads[home]]} on device {home}"
  return ScheduleError(f"{step} on device {d} waits for {maker}, {where}")
