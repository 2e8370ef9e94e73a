"""Recompute as an action of its own, run while the device would wait for the gradient anyway.

Rematerializing (GPipe: Huang et al., 2019, arXiv:1811.06965) keeps only the inputs of a stage and
repeats its forward before its backward. That repetition R needs no gradient, so it fits wherever
the device idles, and the backward pass then travels up the stages without it. GPipe on P=3, M=3,
all of F, R, I and W of length 1:

  device 0 | F0 F1 F2 R0                   B0--- R1 B1--- R2 B2--- | peak 3
  device 1 |    F0 F1 F2 R0          B0--- R1 B1--- R2 B2---       | peak 3
  device 2 |       F0 F1 F2 R0 B0--- R1 B1--- R2 B2---             | peak 3

As a part of the backward, R would be paid once more on each of the P-1 hops of the drain: the
makespan is M (F+R+B) + (P-1)(F+B) instead of (M+P-1)(F+R+B), for GPipe and 1F1B at equal times.

  [1] earliest: run the schedule; in each gap as many Rs as end before what the device waits for
  [2] latest:   walk back from the ends that gives; every R as close to its backward as fits

The first pass delays nothing that R directly before its backward would not delay, so no action
ends later than in that order. The second keeps makespan and span, and no more than that: what R
brings back is held from R to W, so it had better be late.
"""

import bisect
import dataclasses
import heapq
from collections.abc import Iterator

from jaxpipe.schedules.actions import Action, Step
from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.kinds import PRODUCTS, Kind
from jaxpipe.schedules.protocol import Ticks
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.ticks import without_gaps
from jaxpipe.schedules.walk import Visit, walk


@dataclasses.dataclass(frozen=True, slots=True)
class _Recompute:
  """An R, and between which steps of its device's list it may stand.

  Attributes:
    action: the R.
    after: index of the first step that it may follow: its forward, or the gather of its weights.
    before: index of the step that needs it: its backward.
    time: its duration.
  """

  action: Action
  after: int
  before: int
  time: float


# `[d][i]` are the Rs directly before the i-th step of device d's list.
_Fills = list[list[list[_Recompute]]]


def with_recompute(schedule: Schedule, costs: Costs | None = None) -> Schedule:
  """Adds an R for every stage and microbatch, in gaps where there are any.

  Args:
    schedule: a legal schedule without R.
    costs: durations that decide where gaps are; only latencies of hops are planned with, not the
      links that they occupy. Not read of a schedule with ticks of its own.

  Returns:
    The schedule with an R between each F and its I or B. Everything else keeps its order, and its
    ticks if it has any, between which there are further ones for R.

  Raises:
    ValueError: the schedule has Rs already.

  >>> from jaxpipe.schedules import make_schedule
  >>> with_recompute(make_schedule("gpipe", devices=2, microbatches=1)).tokens()
  [['0F0', '0R0', '0B0'], ['1F0', '1R0', '1B0']]
  """
  if schedule.ticks is not None:
    return _by_tick(schedule, schedule.ticks)
  costs = costs or Costs()
  times = costs.all_durations(schedule)
  todo = [list(_recomputes(row, times[Kind.R])) for row in schedule.order]
  durations = [[costs.of(step, times) for step in row] for row in schedule.order]
  visits = list(walk(schedule))
  early, ends = _earliest(visits, durations, todo, costs.hop)
  fills = _latest(visits, durations, todo, costs.hop, ends) or early
  order = tuple(
    tuple(step for i, own in enumerate(row) for step in (*(r.action for r in fills[d][i]), own))
    for d, row in enumerate(schedule.order)
  )
  return schedule.with_order(order)


def _by_tick(schedule: Schedule, ticks: Ticks) -> Schedule:
  """Adds an R for every backward of a schedule with ticks of its own.

  It is a guest on the last tick after its forward on which its device idles and others do F, I or
  B, which take no less; or else it has a tick right before its backward's, for all devices that
  want one.
  """
  kinds: dict[int, set[Kind]] = {}
  for row, at in zip(schedule.order, ticks, strict=True):
    for step, tick in zip(row, at, strict=True):
      kinds.setdefault(tick, set()).update(action.kind for action in step.parts)
  hosts = sorted(tick for tick, found in kinds.items() if found - {Kind.W})
  order: list[tuple[Step, ...]] = []
  own: list[tuple[int, ...]] = []
  for row, at in zip(schedule.order, ticks, strict=True):
    steps: dict[int, Step] = {2 * tick + 1: step for tick, step in zip(at, row, strict=True)}
    for r in _recomputes(row, (0.0,) * schedule.stages):
      first, last = bisect.bisect(hosts, at[r.after]), bisect.bisect_left(hosts, at[r.before])
      idle = (2 * tick + 1 for tick in reversed(hosts[first:last]) if 2 * tick + 1 not in steps)
      steps[next(idle, 2 * at[r.before])] = r.action
    own.append(tuple(sorted(steps)))
    order.append(tuple(steps[tick] for tick in own[-1]))
  return dataclasses.replace(schedule, order=tuple(order), ticks=without_gaps(own))


def _recomputes(row: tuple[Step, ...], times: tuple[float, ...]) -> Iterator[_Recompute]:
  """Yields one R for each backward of a device, in the order of the backwards."""
  made: dict[tuple[int, int], int] = {}
  gathered: dict[int, int] = {}
  for i, step in enumerate(row):
    for action in step.parts:
      stage, m = action.stage, action.microbatch
      if action.kind is Kind.R:
        raise ValueError(f"the schedule has {action} already; add recompute once")
      if action.kind is Kind.F:
        made[stage, m] = i
      elif action.kind is Kind.G:
        gathered[stage] = i
      elif Kind.I in PRODUCTS[action.kind]:
        # Weights that were gathered for the backward are not there before.
        after = max(made[stage, m], gathered.get(stage, 0))
        yield _Recompute(Action(stage, Kind.R, m), after, i, times[stage])


def _empty(durations: list[list[float]]) -> _Fills:
  """Returns fills without any R."""
  return [[[] for _ in row] for row in durations]


def _earliest(
  visits: list[Visit], durations: list[list[float]], todo: list[list[_Recompute]], hop: float
) -> tuple[_Fills, list[list[float]]]:
  """[1] Fills gaps as they come. Returns also when every step ends."""
  fills = _empty(durations)
  ends: list[list[float]] = [[] for _ in durations]
  made: dict[int, tuple[float, int]] = {}
  own = [_by(rs, "before") for rs in todo]
  opening = [_by(rs, "after") for rs in todo]
  # Rs whose forward has run, the next backward's first; those that ran leave only the set.
  waiting: list[list[tuple[int, int]]] = [[] for _ in durations]
  left = [set(range(len(rs))) for rs in todo]
  for visit in visits:
    d, i = visit.device, len(ends[visit.device])
    free = ends[d][-1] if ends[d] else 0
    arrivals = (made[slot] for slot in visit.needs)
    arrival = max((when if where == d else when + hop for when, where in arrivals), default=0)
    for j in own[d].get(i, ()):
      if j in left[d]:
        left[d].remove(j)
        fills[d][i].append(todo[d][j])
        free += todo[d][j].time
    # The visit comes after all that the step needs, so the length of the gap is known.
    while waiting[d]:
      j = waiting[d][0][1]
      if j in left[d]:
        if free + todo[d][j].time > arrival:
          break
        left[d].remove(j)
        fills[d][i].append(todo[d][j])
        free += todo[d][j].time
      heapq.heappop(waiting[d])
    ends[d].append(max(free, arrival) + durations[d][i])
    for j in opening[d].get(i, ()):
      heapq.heappush(waiting[d], (todo[d][j].before, j))
    for slot in visit.makes:
      made[slot] = ends[d][i], d
  return fills, ends


def _latest(
  visits: list[Visit],
  durations: list[list[float]],
  todo: list[list[_Recompute]],
  hop: float,
  ends: list[list[float]],
) -> _Fills | None:
  """[2] Walks back from the ends, never to before what `_earliest` reached.

  No step need end before its entry of `ends`, so all the time between that and the latest start of
  the next step is free for Rs: at least as much as the first pass found.

  Returns:
    The fills; None if Rs of unequal times did not pack.
  """
  fills = _empty(durations)
  # Latest start of what follows on each device, and of what needs each product.
  latest = _deadlines(durations, ends)
  needed: dict[int, list[tuple[float, int]]] = {}
  own = [_by(rs, "before") for rs in todo]
  waiting: list[list[tuple[int, int]]] = [[] for _ in durations]
  position = [len(row) for row in durations]
  for visit in reversed(visits):
    d = visit.device
    position[d] -= 1
    i = position[d]
    # Rs between this step and the next; the one whose forward is nearest cannot wait.
    while waiting[d]:
      r = todo[d][waiting[d][0][1]]
      if latest[d] - r.time < ends[d][i]:
        if r.after == i:
          return None
        break
      heapq.heappop(waiting[d])
      fills[d][i + 1].insert(0, r)
      latest[d] -= r.time
    starts = [at if e == d else at - hop for slot in visit.makes for at, e in needed.pop(slot, ())]
    latest[d] = min([latest[d], *starts]) - durations[d][i]
    for j in own[d].get(i, ()):
      heapq.heappush(waiting[d], (-todo[d][j].after, j))
    for slot in visit.needs:
      needed.setdefault(slot, []).append((latest[d], d))
  return fills


def _deadlines(durations: list[list[float]], ends: list[list[float]]) -> list[float]:
  """Returns the time by which each device must end, for makespan and span not to grow."""
  makespan = max((row[-1] for row in ends if row), default=0)
  begins = [end[0] - time[0] if end else 0 for end, time in zip(ends, durations, strict=True)]
  span = max((end[-1] - at for end, at in zip(ends, begins, strict=True) if end), default=0)
  return [min(makespan, at + span) for at in begins]


def _by(recomputes: list[_Recompute], name: str) -> dict[int, list[int]]:
  """Returns the indices of the Rs by the value of one of their attributes."""
  found: dict[int, list[int]] = {}
  for j, recompute in enumerate(recomputes):
    found.setdefault(getattr(recompute, name), []).append(j)
  return found
