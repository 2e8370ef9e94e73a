"""Frozen layers of the next step in the bubbles of this one (DiffusionPipe: Tian et al., 2024).

A diffusion model trains a backbone on what frozen encoders make of the data. Nothing that is
trained feeds an encoder, so its work for the next step may run at any time during this one: in the
bubbles. 1F1B with P=3, M=4 and one frozen layer that takes 3; a longer step, but no later pass:

  device 0 | F0 F1 F2 0Y0-----    B0--- F3 B1---    B2---    B3---       | peak 3
  device 1 |    F0 F1       B0--- F2 B1--- F3 B2---    B3--- 0Y2-----    | peak 2
  device 2 |       F0 B0--- F1 B1--- F2 B2--- F3 B3--- 0Y1----- 0Y3----- | peak 1

  bubbles   of a device: [before its first step][between steps] ... [after its last][end of step)

  [1] the earliest moment at which some device idles
  [2] the longest layer that some microbatch is ready for and that fits in the rest of the bubble;
      a second plan takes the first such layer, and the better of the two is kept
  [3] nothing ready fits: look again when more is ready, or at the device's next bubble
  [4] what fitted nowhere: at the end of the device that can be done with it first

A layer runs for one microbatch at a time, so several may share a bubble and a batch is cut wherever
a bubble ends, which are the paper's partial batches. All bubbles are those of the timetable that
was given: nothing of it is delayed, so with other costs than were planned with it is still legal,
but may be slower.
"""

import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence

from jaxpipe.schedules.actions import Action, Step
from jaxpipe.schedules.costs import Costs, by_stage
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline, simulate


def with_fillers(schedule: Schedule, layers: int, costs: Costs | None = None) -> Schedule:
  """Adds every frozen layer's work for the next step, in bubbles while they last.

  Args:
    schedule: a legal schedule without fillers.
    layers: number of frozen layers; each runs after the one before it, on any device.
    costs: durations to plan with; `filler` is that of one layer for one microbatch.

  Returns:
    The schedule with a Y for every frozen layer and microbatch. Everything else keeps its
    order and, at these costs, its times.

  Raises:
    ValueError: there are fillers already, no layers, or not one cost for each.
  """
  costs = costs or Costs()
  if layers < 1:
    raise ValueError(f"there are no fillers with layers={layers}; use layers=1 or more")
  if any(part.kind is Kind.Y for row in schedule.order for step in row for part in step.parts):
    raise ValueError("the schedule has fillers already; add those of all layers at once")
  times = by_stage("filler", costs.filler, layers)
  timeline = simulate(schedule, costs)
  # Neither is always the better one: the longest first, or the layer that most others wait for.
  priorities = (sorted(range(layers), key=lambda layer: (-times[layer], layer)), range(layers))
  plans = [_plan(timeline, times, costs.hop, priority) for priority in priorities]
  # Equal ends go to the first.
  best = min(plans, key=lambda plan: max(plan.busy))
  order = tuple(tuple(_insert(*pair)) for pair in zip(schedule.order, best.placed, strict=True))
  return schedule.with_order(order)


@dataclasses.dataclass(frozen=True, slots=True)
class _Bubble:
  """A stretch of time in which a device is idle.

  Attributes:
    start: when the step before it ends.
    end: when the step after it starts; infinite after the last step of a plan.
    position: index in the device's list of the step after it.
  """

  start: float
  end: float
  position: int


class _Plan:
  """The fillers that have been placed so far, and those that may come next."""

  def __init__(
    self, timeline: Timeline, times: tuple[float, ...], hop: float, priority: Sequence[int]
  ) -> None:
    self.times, self.hop, self.priority = times, hop, priority
    # By layer, the microbatches that it may run next: from when, which, and where they come from.
    self.ready: list[list[tuple[float, int, int]]] = [[] for _ in times]
    # The first layer waits for nothing, which comes from nowhere.
    self.ready[0] = [(-hop, m, -1) for m in range(timeline.schedule.microbatches)]
    # By device: until when fillers keep it busy, and what stands before which step.
    self.busy: list[float] = [0] * len(timeline.end)
    self.placed: list[list[tuple[int, Action]]] = [[] for _ in timeline.end]

  def arrival(self, layer: int, d: int) -> float:
    """Returns when device d could have the input of the layer's next microbatch."""
    at, _, home = self.ready[layer][0]
    return at if home == d else at + self.hop


def _plan(
  timeline: Timeline, times: tuple[float, ...], hop: float, priority: Sequence[int]
) -> _Plan:
  """Places all fillers, trying layers in the order of `priority` whenever a device idles."""
  plan = _Plan(timeline, times, hop, priority)
  ends = timeline.end
  _fill(plan, [list(_bubbles(timeline, d)) for d in range(len(ends))])
  # [4] Bubbles that never end, from where each device is done with its own.
  done = [max(row[-1] if row else 0, at) for row, at in zip(ends, plan.busy, strict=True)]
  _fill(plan, [[_Bubble(at, math.inf, len(row))] for row, at in zip(ends, done, strict=True)])
  return plan


def _bubbles(timeline: Timeline, d: int) -> Iterator[_Bubble]:
  """Yields the bubbles of a device within the makespan, in order."""
  starts = (*timeline.start[d], timeline.makespan)
  ends = (0, *timeline.end[d])
  for i, (start, end) in enumerate(zip(ends, starts, strict=True)):
    if end > start:
      yield _Bubble(start, end, i)


def _fill(plan: _Plan, bubbles: list[list[_Bubble]]) -> None:
  """Walks through all devices' bubbles in the order of time, and places what fits."""
  # When to look at which device, and in which of its bubbles.
  events = [(row[0].start, d, 0) for d, row in enumerate(bubbles) if row]
  heapq.heapify(events)
  # Devices that have found nothing in their bubble.
  idle: dict[int, int] = {}
  while events:
    now, d, b = heapq.heappop(events)  # [1]
    bubble = bubbles[d][b]
    # Who was woken may have found work meanwhile, or left the bubble.
    if now < plan.busy[d] or now >= bubble.end:
      continue
    idle.pop(d, None)
    layer = _choose(plan, d, now, bubble.end)  # [2]
    if layer is not None:
      end = _place(plan, layer, d, now, bubble.position)
      heapq.heappush(events, (end, d, b))
      for other, c in idle.items():
        heapq.heappush(events, (end + plan.hop, other, c))
      continue
    idle[d] = b  # [3]
    later = _next_arrival(plan, d, now, bubble.end)
    if later is not None:
      heapq.heappush(events, (later, d, b))
    if b + 1 < len(bubbles[d]):
      heapq.heappush(events, (bubbles[d][b + 1].start, d, b + 1))


def _choose(plan: _Plan, d: int, now: float, end: float) -> int | None:
  """Returns the first layer by priority that is ready on device d and done by `end`, or None."""
  for layer in plan.priority:
    if plan.ready[layer] and now + plan.times[layer] <= end and plan.arrival(layer, d) <= now:
      return layer
  return None


def _place(plan: _Plan, layer: int, d: int, now: float, position: int) -> float:
  """Runs the layer's next microbatch; returns when it ends."""
  _, m, _ = heapq.heappop(plan.ready[layer])
  end = plan.busy[d] = now + plan.times[layer]
  plan.placed[d].append((position, Action(layer, Kind.Y, m)))
  if layer + 1 < len(plan.times):
    heapq.heappush(plan.ready[layer + 1], (end, m, d))
  return end


def _next_arrival(plan: _Plan, d: int, now: float, end: float) -> float | None:
  """Returns when the next input of a layer that fits comes to device d; None if none is known."""
  arrivals = (
    (plan.arrival(layer, d), time) for layer, time in enumerate(plan.times) if plan.ready[layer]
  )
  return min((at for at, time in arrivals if at > now and at + time <= end), default=None)


def _insert(row: tuple[Step, ...], placed: list[tuple[int, Action]]) -> Iterator[Step]:
  """Yields a device's list with each filler before the step at its position."""
  # Bubbles were filled in the order of time, so positions ascend.
  fillers = iter(placed)
  position, filler = next(fillers, (len(row) + 1, None))
  for i in range(len(row) + 1):
    while position == i and filler is not None:
      yield filler
      position, filler = next(fillers, (len(row) + 1, None))
    yield from row[i : i + 1]
