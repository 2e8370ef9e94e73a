"""Routes of microbatches through devices, and the timetable that follows from them.

A microbatch need not visit every stage, and a stage may live on several devices, which need not be
equally fast. A route is the row of devices that a microbatch's forward passes; its backward goes
the same way back. Routes alone make a timetable, by one rule:

  A free device starts, of what has arrived and what memory allows, a backward before a forward, and
  the lower microbatch first.

Nothing is ever delayed on purpose, so that the rule needs no times, and two microbatches are never
on one device at once: the later of them waits. Such a wait is a *collision*, and what searches for
routes try to avoid.
"""

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator

from jaxpipe.schedules.actions import Action, Order, ScheduleError
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement

# The devices that a microbatch passes, in order.
Route = tuple[int, ...]
Routes = tuple[Route, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """Devices with one stage each, and the conditions on routes through them.

  Attributes:
    placement: one stage per device; a stage may live on several.
    microbatches: number of microbatches, M.
    visits: stages that each microbatch visits, the first stage first.
    cap: most microbatches that may visit any stage but the first.
    forward: P times of F, by device.
    backward: P times of B, by device.
    capacity: P numbers, the most microbatches that a device may hold from F to B.
    hop: latency between devices.
    reorder: whether stages may be visited in any order; ascending otherwise.
    least: fewest microbatches that must visit any stage but the first.
  """

  placement: Placement
  microbatches: int
  visits: int
  cap: int
  forward: tuple[float, ...]
  backward: tuple[float, ...]
  capacity: tuple[float, ...]
  hop: float = 0
  reorder: bool = False
  least: int = 0

  def stage(self, device: int) -> int:
    """Returns the stage that a device holds."""
    return self.placement.table[device][0]

  def allows(self, routes: Routes) -> bool:
    """Whether every stage but the first has from `least` to `cap` visits."""
    counts = collections.Counter(self.stage(d) for route in routes for d in route[1:])
    visits = [counts[stage] for stage in range(1, self.placement.stages)]
    return all(self.least <= count <= self.cap for count in visits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The timetable of routes.

  Attributes:
    order: each device's list.
    makespan: time at which the last pass ends; infinite where the routes block each other.
    collisions: (time lost, microbatch, the one it waited for, device), in order of time.
  """

  order: Order
  makespan: float
  collisions: tuple[tuple[float, int, int, int], ...]


def dispatch(network: Network, routes: Routes) -> Run:
  """Runs microbatches along their routes.

  Args:
    network: devices, times and capacities.
    routes: one route per microbatch.

  Returns:
    The timetable. Computing it takes the time of sorting the passes.
  """
  return _Dispatch(network, routes).run()


class _Dispatch:
  """The state of all devices, which `run` moves forward in time."""

  def __init__(self, network: Network, routes: Routes) -> None:
    P = network.placement.devices
    self.network, self.routes = network, routes
    self.order: list[list[Action]] = [[] for _ in range(P)]
    self.busy = [False] * P
    self.held = [0] * P
    # By device, the (microbatch, arrival) of backwards and of forwards, lowest microbatch first.
    self.ready: list[tuple[list[tuple[int, float]], ...]] = [([], []) for _ in range(P)]
    self.collisions: list[tuple[float, int, int, int]] = []
    # (time, device, 0 for B and 1 for F, microbatch, whether it ends rather than arrives)
    self.events = [(0.0, route[0], 1, m, False) for m, route in enumerate(routes)]
    heapq.heapify(self.events)

  def run(self) -> Run:
    """Processes events until there are none."""
    now = 0.0
    while self.events:
      now = self.events[0][0]
      touched = set()
      # A device chooses when it knows all that this moment brings.
      while self.events and self.events[0][0] == now:
        _, d, which, m, ends = heapq.heappop(self.events)
        touched.add(d)
        if ends:
          self._end(now, d, which, m)
        else:
          heapq.heappush(self.ready[d][which], (m, now))
      for d in sorted(touched):
        if not self.busy[d]:
          self._start(now, d)
    blocked = any(ready for pair in self.ready for ready in pair)
    return Run(
      order=tuple(map(tuple, self.order)),
      makespan=math.inf if blocked else now,
      collisions=tuple(self.collisions),
    )

  def _start(self, now: float, d: int) -> None:
    """Starts the next pass on a free device: a backward before a forward, the lower microbatch."""
    network = self.network
    which = 0 if self.ready[d][0] else 1
    if not self.ready[d][which] or (which and self.held[d] >= network.capacity[d]):
      return
    m, arrival = heapq.heappop(self.ready[d][which])
    if arrival < now:
      self.collisions.append((now - arrival, m, self.order[d][-1].microbatch, d))
    self.held[d] += 1 if which else 0
    self.order[d].append(Action(network.stage(d), Kind.F if which else Kind.B, m))
    self.busy[d] = True
    duration = (network.forward if which else network.backward)[d]
    heapq.heappush(self.events, (now + duration, d, which, m, True))

  def _end(self, now: float, d: int, which: int, m: int) -> None:
    """Ends a pass, and sends the microbatch to the next device of its route, or back."""
    self.busy[d] = False
    self.held[d] -= 0 if which else 1
    route = self.routes[m]
    i = route.index(d) + (1 if which else -1)
    if i == len(route):
      heapq.heappush(self.events, (now, d, 0, m, False))  # the loss turns it round
    elif i >= 0:
      heapq.heappush(self.events, (now + self.network.hop, route[i], which, m, False))


def all_routes(network: Network) -> Iterator[Route]:
  """Yields every route that one microbatch may take, whatever the others do."""
  stages, k = range(1, network.placement.stages), network.visits
  ways = itertools.permutations if network.reorder else itertools.combinations
  for path in ways(stages, k - 1):
    yield from itertools.product(*(network.placement.homes(stage) for stage in (0, *path)))


def balanced(network: Network) -> Routes:
  """Returns routes without a search: runs of stages, dealt in turn, and their devices likewise.

  Raises:
    ScheduleError: fewer stages may be visited than `visits` and `cap` ask for.
  """
  S, k = network.placement.stages, network.visits
  if network.microbatches * (k - 1) > network.cap * (S - 1):
    raise ScheduleError(
      f"{network.microbatches} microbatches cannot visit {k} of {S} stages with cap={network.cap};"
      f" use cap={math.ceil(network.microbatches * (k - 1) / (S - 1))} or more"
    )
  taken = [0] * S
  routes = []
  for m in range(network.microbatches):
    # Consecutive in a ring of all stages but the first: no stage is ever two visits ahead.
    path = [0, *sorted(1 + (m * (k - 1) + j) % (S - 1) for j in range(k - 1))]
    route = []
    for stage in path:
      homes = network.placement.homes(stage)
      route.append(homes[taken[stage] % len(homes)])
      taken[stage] += 1
    routes.append(tuple(route))
  return tuple(routes)
