"""List scheduling: whenever a device is free, it starts the most urgent action that it may.

Graham's list scheduling (1966) for split backward passes, on any placement: families differ in
what is urgent, and in how much memory there is, not in how time is walked through. It is the
engine below the V-shaped families and serves wherever costs are uneven, where a drawn pattern no
longer fits. P=2 in a V, M=2, the second chunk in small letters; I goes before F, and W into gaps:

  device 0 | F0 F1    f0 i0 f1 i1 I0 W0 I1 w0 W1 w1 | peak 4
  device 1 |    F0 f0 F1 f1 i0 I0 i1 I1 W0 w0 W1 w1 | peak 4

  [1] an event is a moment at which a device ends its work or something reaches it
  [2] the device takes the most urgent head of its lanes that is there and that memory allows
  [3] nothing to take, or a gap before it comes: a W, which never waits and frees memory

A lane is one stage on one device; `lanes` explains them and why no memory limit can dead-lock.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence

from jaxpipe.schedules.actions import Action, Order, ScheduleError
from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.kinds import REQUIRED, Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.lanes import F, I, Lane, State, W, Work, fits

# By (kind, stage, microbatch). Smaller is more urgent; of equals the lower microbatch goes first.
Urgency = Callable[[Kind, int, int], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """The rules by which a device chooses its next action.

  Attributes:
    urgency: urgency of F, I and W by (kind, stage, microbatch); smaller goes first. Within one kind
      and stage, earlier microbatches of a lane come first whatever it says. A W whose urgency is
      infinite runs in gaps only, or when memory is short.
    in_flight: most microbatches that a stage may hold from F to W, by stage; None for no bound.
    rank: a device runs F and I in ascending order of it, however long it waits; among equals
      urgency decides. None ranks all alike. W is free to move.
    patience: time that a device waits for something more urgent that it knows to be coming.
    gap: share of a W that must fit into a gap of known length for the W to start there.
    pending: most Ws that a device may put off, however urgent the rest is.
  """

  urgency: Urgency
  in_flight: Sequence[int] | None = None
  rank: Urgency | None = None
  patience: float = 0
  gap: float = 0
  pending: float = math.inf


def all_work(placement: Placement, microbatches: int) -> Work:
  """Returns the work of every microbatch on every stage, where each stage lives on one device."""
  return [{stage: range(microbatches) for stage in row} for row in placement.table]


def list_schedule(
  placement: Placement,
  work: Work,
  policy: Policy,
  *,
  costs: Costs | None = None,
  memory: Memory = (1, 0, -1),
  limit: float | Sequence[float] | None = None,
) -> Order:
  """Schedules F, I and W of every microbatch on every stage, greedily in time.

  Args:
    placement: where the stages live.
    work: what each device runs. Every stage's lanes must hold every microbatch once in all.
    policy: what goes first, and when a device rather waits.
    costs: durations to plan with.
    memory: what an F, an I and a W change in what a device holds.
    limit: most memory that a device may hold, one number or one per device; None for no limit.

  Returns:
    Each device's list. Time is linear in the number of actions times the stages of a device.

  Raises:
    ValueError: a limit is too low for one microbatch.
    ScheduleError: ranks that no order in time can keep, or that need more memory than the limit.

  >>> policy = Policy(urgency=lambda kind, stage, microbatch: microbatch)
  >>> order = list_schedule(Placement.loop(2), [{0: [0]}, {1: [0]}], policy)
  >>> [" ".join(map(str, row)) for row in order]
  ['0F0 0I0 0W0', '1F0 1I0 1W0']
  """
  return _run(State(placement, work, policy.in_flight, costs or Costs(), memory, limit), policy)


# An action that a device may start: when, its urgency, microbatch, number of its kind, and lane.
_Choice = tuple[float, float, int, int, Lane]
# The next action of a lane: the lane, number of the kind, microbatch, and when its input comes.
_Head = tuple[Lane, int, int, float]


def _run(state: State, policy: Policy) -> Order:
  """Moves all lanes forward in time until everything has run."""
  order: list[list[Action]] = [[] for _ in state.lanes]
  free: list[float] = [0] * len(order)
  todo = 3 * len(state.lane_of)
  # [1] The device breaks ties, so that results do not depend on how events came about.
  events: list[tuple[float, int]] = [(0, d) for d in range(len(order))]
  while events:
    now, d = heapq.heappop(events)
    if now < free[d]:
      continue
    # Several events may fall on one moment, which is looked at once.
    while events and events[0] == (now, d):
      heapq.heappop(events)
    choice = _choose(state, policy, d, now)
    if choice is None:
      continue  # whatever it waits for wakes it
    start, _, m, which, lane = choice
    if start > now:
      heapq.heappush(events, (start, d))
      continue
    todo -= 1
    end = free[d] = now + state.durations[which][lane.stage]
    order[d].append(Action(lane.stage, REQUIRED[which], m))
    state.held[d] += state.changes[which][lane.stage]
    lane.heads[which] += 1
    heapq.heappush(events, (end, d))
    reached = _announce(state, lane, which, m, end)
    if reached is not None:
      heapq.heappush(events, reached)
  if todo:
    raise ScheduleError(f"the ranks of a policy dead-lock with {todo} actions to go")
  return tuple(map(tuple, order))


def _announce(state: State, lane: Lane, which: int, m: int, end: float) -> tuple[float, int] | None:
  """Notes when a product reaches the next stage, and returns that time and the device there.

  Returns:
    None where nobody else waits: for a W, and at either end of the model.
  """
  if which == W or (which == I and lane.stage == 0):
    return None
  if which == F and lane.stage == state.stages - 1:
    lane.grads[m] = end
    return None
  target = state.lane_of[lane.stage + (1 if which == F else -1), m]
  arrival = end if target.device == lane.device else end + state.hop
  (target.arrivals if which == F else target.grads)[m] = arrival
  return arrival, target.device


def _choose(state: State, policy: Policy, d: int, now: float) -> _Choice | None:
  """Returns [2] the most urgent head or [3] a W; one that starts later means to wait for it."""
  put_off = _most_urgent_weight(state, policy, d, now)
  if put_off and sum(a.heads[I] - a.heads[W] for a in state.lanes[d]) >= policy.pending:
    return put_off
  best = _in_reach(state, policy, d, now)
  if put_off and best and put_off[1:4] < best[1:4]:
    return put_off
  if put_off and (best is None or best[0] > now):
    weight = state.durations[W][put_off[4].stage]
    # A gap of unknown length is taken to be long.
    if best is None or best[0] - now >= policy.gap * weight:
      return put_off
  return best


def _in_reach(state: State, policy: Policy, d: int, now: float) -> _Choice | None:
  """Returns the most urgent F or I that comes before patience ends, else the one that is first."""
  best: _Choice | None = None
  coming: _Choice | None = None
  ranked = policy.rank is not None
  for lane, which, m, arrival in _coming(state, policy, d) if ranked else _known(state, d):
    if arrival == math.inf or not fits(state, lane, which, ranked=ranked):
      continue
    start = max(now, arrival)
    choice = (start, policy.urgency(REQUIRED[which], lane.stage, m), m, which, lane)
    if start <= now + policy.patience and (best is None or choice[1:4] < best[1:4]):
      best = choice
    if coming is None or choice[:4] < coming[:4]:
      coming = choice
  return best or coming


def _known(state: State, d: int) -> list[_Head]:
  """Returns the next F and I of each lane that are known to come, with the times."""
  found: list[_Head] = []
  for lane in state.lanes[d]:
    microbatches = lane.microbatches
    for which, times in ((F, lane.arrivals), (I, lane.grads)):
      at = lane.heads[which]
      if at < len(microbatches):
        m = microbatches[at]
        if times[m] != math.inf:
          found.append((lane, which, m, times[m]))
  return found


def _coming(state: State, policy: Policy, d: int) -> list[_Head]:
  """Returns the next F and I of each lane, those of the lowest rank only, known to come or not."""
  assert policy.rank is not None
  heads = [
    (lane, which, lane.microbatches[lane.heads[which]])
    for lane in state.lanes[d]
    for which in (F, I)
    if lane.heads[which] < len(lane.microbatches)
  ]
  places = [policy.rank(REQUIRED[which], lane.stage, m) for lane, which, m in heads]
  return [
    (lane, which, m, (lane.arrivals if which == F else lane.grads)[m])
    for (lane, which, m), place in zip(heads, places, strict=True)
    if place == min(places)
  ]


def _most_urgent_weight(state: State, policy: Policy, d: int, now: float) -> _Choice | None:
  """Returns the most urgent W whose I has run on device d, or None."""
  best: _Choice | None = None
  for lane in state.lanes[d]:
    at = lane.heads[W]
    if at < lane.heads[I]:
      m = lane.microbatches[at]
      choice = (now, policy.urgency(Kind.W, lane.stage, m), m, W, lane)
      if best is None or choice[1:4] < best[1:4]:
        best = choice
  return best
