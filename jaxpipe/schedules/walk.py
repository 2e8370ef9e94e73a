"""What each action waits for, and the order in which a schedule's actions can run.

Checking and simulating are the same walk: devices work through their lists in order, and an
action waits until what it needs has been produced. The walk visits every action once and wakes a
device only when what it waits for appears, so it is linear in the number of actions.

  awake: [1]   device 0: 0F0 0F1 [0B0] 0B1        [2] the head, and what it still misses
  devices      device 1: 1F0 [1B0] 1F1 1B1        [3] sleepers: {slot of 1I0: [device 0]}
  to look at   order, heads in brackets           [4] running 1B0 makes 1I0 and wakes device 0
"""

from collections.abc import Iterator

from jaxpipe.schedules.actions import PRODUCTS, Action, Kind, Order, ScheduleError

# The products that other actions wait for, in the order in which `walk` numbers them.
_AWAITED = (Kind.F, Kind.I)


def _needs(kind: Kind, stage: int, stages: int) -> tuple[tuple[Kind, int], ...]:
  """The products, as (kind, stage), that an action needs of its own microbatch."""
  # Stage 0 reads the batch, which is always there.
  if kind is Kind.F:
    return ((Kind.F, stage - 1),) if stage else ()
  if kind is Kind.W:
    return ((Kind.I, stage),)
  own = (Kind.F, stage)
  # The last stage's gradient begins at its own loss; a recompute repeats what its forward read.
  if kind is Kind.R or stage == stages - 1:
    return (own,)
  return (own, (Kind.I, stage + 1))


def dependencies(action: Action, stages: int) -> tuple[Action, ...]:
  """What an action waits for.

  Args:
    action: any action.
    stages: number of stages, S.

  Returns:
    The actions it needs, its own stage's first. An input gradient is named `I`, whether the
    schedule produces it by an `I` or by a fused `B`.

  >>> [str(needed) for needed in dependencies(Action.parse("2B0"), 4)]
  ['2F0', '3I0']
  """
  needed = _needs(action.kind, action.stage, stages)
  return tuple(Action(stage, kind, action.microbatch) for kind, stage in needed)


def slot(kind: Kind, stage: int, microbatch: int, stages: int, microbatches: int) -> int:
  """Numbers the awaited products, F and I of every stage and microbatch, from 0."""
  return (_AWAITED.index(kind) * stages + stage) * microbatches + microbatch


def walk(
  order: Order, stages: int, microbatches: int
) -> Iterator[tuple[int, Action, tuple[int, ...], int | None]]:
  """Visits every action of a schedule after all that it waits for.

  Args:
    order: every device's list.
    stages: number of stages, S.
    microbatches: number of microbatches, M.

  Yields:
    The device, the action, the `slot`s of the products it needs and the slot of what it produces
    (None where nothing waits for it). Each device's actions come in the order of its list.

  Raises:
    ScheduleError: the schedule dead-locks.
  """
  # Looking needs up by (kind, stage) keeps the loop below free of object building: schedules of
  # half a million actions are walked in a second.
  inputs = {
    kind: [
      [slot(k, s, 0, stages, microbatches) for k, s in _needs(kind, stage, stages)]
      for stage in range(stages)
    ]
    for kind in Kind
  }
  output = {
    kind: next((_AWAITED.index(p) * stages for p in PRODUCTS[kind] if p in _AWAITED), None)
    for kind in Kind
  }
  done = bytearray(len(_AWAITED) * stages * microbatches)
  heads = [0] * len(order)
  sleepers: dict[int, list[int]] = {}
  awake = list(range(len(order)))[::-1]  # [1]
  while awake:
    d = awake.pop()
    row = order[d]
    while heads[d] < len(row):
      action = row[heads[d]]
      m = action.microbatch
      needed = tuple(base + m for base in inputs[action.kind][action.stage])
      # [2] The first missing one is enough: when it appears, the head is looked at again.
      missing = next((i for i in needed if not done[i]), None)
      if missing is not None:
        # [3] Several devices may wait for one product, in schedules that are not legal.
        sleepers.setdefault(missing, []).append(d)
        break
      base = output[action.kind]
      made = None if base is None else (base + action.stage) * microbatches + m
      yield d, action, needed, made
      # The head moves after the yield: while the caller handles an action, it is not done yet.
      heads[d] += 1
      if made is not None:
        done[made] = 1
        # [4] Only now, so that nobody is woken for what the caller has not recorded.
        awake += sleepers.pop(made, ())
  if any(head < len(row) for head, row in zip(heads, order, strict=True)):
    raise _deadlock(order, heads, stages)


def _deadlock(order: Order, heads: list[int], stages: int) -> ScheduleError:
  """Says which action can never run and what it waits for."""
  # Only what is left can block; what has run is neither searched nor named.
  makers = {
    (product, action.stage, action.microbatch): (d, action)
    for d, row in enumerate(order)
    for action in row[heads[d] :]
    for product in PRODUCTS[action.kind]
  }

  def blocker(d: int) -> tuple[int, Action] | None:
    for needed in dependencies(order[d][heads[d]], stages):
      found = makers.get((needed.kind, needed.stage, needed.microbatch))
      if found is not None:
        return found
    return None

  # Many devices sleep in a dead-lock, most of them only behind others. Following who waits for
  # whom must end in a cycle; its first action is the cause, the rest are consequences.
  blocked: dict[int, tuple[int, Action]] = {}
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
  if home == d:
    where = "which stands later in the same list"
  elif maker == order[home][heads[home]]:
    where = f"which cannot run on device {home} either"
  else:
    where = f"which stands behind {order[home][heads[home]]} on device {home}"
  return ScheduleError(f"{order[d][heads[d]]} on device {d} waits for {maker}, {where}")
