"""Vocabulary parallelism: the output layer on all devices (Yeung et al., 2024, arXiv:2411.05288).

An output layer that only the last stage holds makes that stage the slowest, and everybody waits
for it. Here every device holds a shard of the vocabulary and runs, for every microbatch, S (logits
of its shard) and T (the weight gradient). The shards meet at barriers:

  1 barrier   last F -> all S ------------> last stage's backward;   all S -> T at any time
  2 barriers  last F -> all S -> all T ---> last stage's backward

1F1B with P=3, M=4, one barrier, F, I and W of length 2, S of 2 and T of 1:

  device 0 | F0--- F1--- F2--- S0--- F3--- S1--- T0 T1                S2--- B0--------- T2  ...
  device 1 |       F0--- F1--- S0--- F2--- S1--- T0 T1          B0--------- S2--- F3--- T2  ...
  device 2 |             F0--- S0--- F1--- S1--- T0 B0--------- F2--- S2--- T1 B1---------  ...

The last stage's backward now waits for others, so each device runs every forward in the place of
the one `barriers` before it. 1F1B then holds P+1 or P+2 microbatches instead of P, and where hops
are short beside passes there is no new bubble per microbatch; only V-Min, which has no memory to
spare, waits 8 % longer where P mod 3 is 2. Any schedule is shifted so: it holds at most `barriers`
chunks more.

What runs when is decided in time: whoever is free runs [1] an S at once, as all wait for it,
or [2] what the shifted list has next or, if that is not there yet, a backward that need not stay
behind it, or [3] a T where nothing else is there; a second T that waits goes before all else, and
with two barriers every T, for all wait for it too.
"""

import collections
import dataclasses
import heapq
import math

from jaxpipe.schedules.actions import Action, Overlap, Step
from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.kinds import PRODUCTS, STAGE_KINDS, Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.transforms.shift import Item, Lists, shifted

# Weight gradients of the output layer that a device puts off before they go first.
_BACKLOG = 1

# Microbatches, each with the time from which a pass of theirs may run.
_Queue = collections.deque[tuple[float, int]]


def with_vocabulary(schedule: Schedule, barriers: int = 1, costs: Costs | None = None) -> Schedule:
  """Shards the output layer: adds an S and a T for every device and microbatch.

  Args:
    schedule: a legal schedule of F, R, I, W and B.
    barriers: 1 if S computes all that the last stage's backward needs, 2 if T does.
    costs: durations to plan with; `head` is what the passes share.

  Returns:
    A schedule with that many `vocabulary` barriers. Forwards keep their order on each device, and
    so does everything else; overlapped pairs stay pairs where both come in time.

  Raises:
    ValueError: another number of barriers, or the schedule has other actions.
  """
  if barriers not in (1, 2):
    raise ValueError(f"there is no vocabulary={barriers}; use 1 or 2 barriers")
  for row in schedule.order:
    for step in row:
      if not STAGE_KINDS.issuperset(action.kind for action in step.parts):
        raise ValueError(
          f"vocabulary passes cannot be added to a schedule with {step}; add them to one of"
          " F, R, I, W and B, and only once"
        )
  state = _State(schedule, barriers, costs or Costs())
  _run(state)
  order = tuple(tuple(device.row) for device in state.devices)
  return dataclasses.replace(schedule.with_order(order), vocabulary=barriers)


@dataclasses.dataclass(slots=True)
class _Device:
  """The work that one device has still to do, and the list that it has made so far.

  Attributes:
    lists: its forwards and its other actions, and how many of each have run.
    shards: microbatches whose S may run, each with the time from which it may.
    weights: microbatches whose T may run, each with the time from which it may.
    free: when it has ended what it does now.
    row: its list so far.
  """

  lists: Lists
  shards: _Queue = dataclasses.field(default_factory=collections.deque)
  weights: _Queue = dataclasses.field(default_factory=collections.deque)
  free: float = 0
  row: list[Step] = dataclasses.field(default_factory=list)


class _State:
  """The state of all devices, which `_run` moves forward in time."""

  def __init__(self, schedule: Schedule, barriers: int, costs: Costs) -> None:
    M, P = schedule.microbatches, schedule.devices
    self.schedule, self.barriers, self.costs = schedule, barriers, costs
    self.times = costs.all_durations(dataclasses.replace(schedule, vocabulary=barriers))
    # A device alone sends nothing.
    self.hop = costs.hop if P > 1 else 0
    self.last = [schedule.path(m)[-1] for m in range(M)]
    self.devices = [_Device(lists) for lists in shifted(schedule, barriers)]
    self.receivers: dict[int, list[int]] = {}
    for d, device in enumerate(self.devices):
      for item in (*device.lists.forwards, *device.lists.others):
        for slot in item.needs:
          self.receivers.setdefault(slot, []).append(d)
    # Slot -> when and where the product appeared.
    self.made: dict[int, tuple[float, int]] = {}
    # By microbatch: the passes that a barrier still waits for, and the end of the latest other.
    self.missing = {kind: [P] * M for kind in (Kind.S, Kind.T)}
    self.before = {kind: [-self.hop] * M for kind in (Kind.S, Kind.T)}
    # By microbatch: from when the last stage's backward may run, on each device.
    self.loss: list[list[float]] = [[math.inf] * P] * M
    self.events: list[tuple[float, int]] = [(0, d) for d in range(P)]


def _run(state: _State) -> None:
  """Lets every device begin what it can at every event, until none can begin anything."""
  while state.events:
    while state.events:
      now, d = heapq.heappop(state.events)
      if now >= state.devices[d].free:
        _start(state, d, now, patient=True)
    # Where all wait, some wait for the other half of a pair: one of those runs its half alone.
    any(_start(state, d, now, patient=False) for d in range(len(state.devices)))


def _start(state: _State, d: int, now: float, *, patient: bool) -> bool:
  """Lets a free device begin the next step, and returns whether it could."""
  device = state.devices[d]
  step, makes = _choose(state, d, now, patient) or (None, ())
  if step is None:
    return False
  end = device.free = now + state.costs.of(step, state.times)
  device.row.append(step)
  heapq.heappush(state.events, (end, d))
  for slot in makes:
    state.made[slot] = end, d
    for receiver in state.receivers.get(slot, ()):
      heapq.heappush(state.events, (end if receiver == d else end + state.hop, receiver))
  for action in step.parts:
    _announce(state, action, d, end)
  return True


def _announce(state: _State, action: Action, d: int, end: float) -> None:
  """Notes the end of an action that passes at a barrier wait for, and lets those go on."""
  kind, m = action.kind, action.microbatch
  if kind is Kind.F and action.stage == state.last[m]:
    _wake(state, Kind.S, m, [end if e == d else end + state.hop for e in range(len(state.devices))])
  elif kind in (Kind.S, Kind.T):
    # Passes take equally long and are announced in the order in which they begin: the last one
    # announced is the last to end, and waits itself for the one before.
    met = max(end, state.before[kind][m] + state.hop)
    state.before[kind][m] = end
    state.missing[kind][m] -= 1
    if state.missing[kind][m] == 0:
      times = [met if e == d else end + state.hop for e in range(len(state.devices))]
      _wake(state, Kind.T if kind is Kind.S else None, m, times)


def _wake(state: _State, kind: Kind | None, m: int, times: list[float]) -> None:
  """Allows every device its S or T of a microbatch, and after the last barrier its backward."""
  # The last barrier is that of S where there is one, after which T may run, and else that of T.
  if kind is (Kind.T, None)[state.barriers - 1]:
    state.loss[m] = times
  for d, at in enumerate(times):
    if kind is not None:
      device = state.devices[d]
      (device.shards if kind is Kind.S else device.weights).append((at, m))
    heapq.heappush(state.events, (at, d))


def _choose(
  state: _State, d: int, now: float, patient: bool
) -> tuple[Step, tuple[int, ...]] | None:
  """Returns the step that device d begins now, with the slots of its products; None to wait."""
  device = state.devices[d]
  shards, weights = device.shards, device.weights
  may_shard = bool(shards) and shards[0][0] <= now
  may_weigh = bool(weights) and weights[0][0] <= now
  # With two barriers T is what everybody waits for, and its microbatch is the older one.
  if may_weigh and (state.barriers == 2 or len(weights) > _BACKLOG):
    return Action(d, Kind.T, weights.popleft()[1]), ()
  if may_shard:
    return Action(d, Kind.S, shards.popleft()[1]), ()  # [1]
  found = _choose_next(state, d, now, patient)  # [2]
  if found is None and may_weigh:
    return Action(d, Kind.T, weights.popleft()[1]), ()  # [3]
  return found


def _choose_next(
  state: _State, d: int, now: float, patient: bool
) -> tuple[Step, tuple[int, ...]] | None:
  """Returns the next step of the shifted lists, or None; the patient keep pairs together."""
  lists = state.devices[d].lists
  forward, other = lists.heads()
  may_forward = forward is not None and _has_arrived(state, forward, d, now)
  may_other = other is not None and _has_arrived(state, other, d, now)
  if other and other.gate and patient:
    if forward and may_forward and may_other and lists.forwards_run == other.gate:
      lists.forwards_run += 1
      lists.others_run += 1
      return Overlap(forward.action, other.action), forward.makes + other.makes
    # Neither half of a pair goes without the other; forwards before the pair's own do.
    may_other = may_other and lists.forwards_run > other.gate
    may_forward = may_forward and lists.forwards_run < other.gate
  if forward and may_forward:
    lists.forwards_run += 1
    return forward.action, forward.makes
  if other and may_other:
    lists.others_run += 1
    return other.action, other.makes
  return None


def _has_arrived(state: _State, item: Item, d: int, now: float) -> bool:
  """Whether all that an action waits for has reached device d."""
  action = item.action
  m = action.microbatch
  if Kind.I in PRODUCTS[action.kind] and action.stage == state.last[m] and state.loss[m][d] > now:
    return False
  for slot in item.needs:
    made = state.made.get(slot)
    if made is None or (made[0] if made[1] == d else made[0] + state.hop) > now:
      return False
  return True
