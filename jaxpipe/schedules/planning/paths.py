"""Finds the paths of microbatches through a network whose stages may be skipped.

It is multi-agent path finding: each microbatch wants the shortest way through `visits` stages, and
no two may use a device at once. As in SkipPipe (Blagoev et al., 2025, arXiv:2502.19913) every
microbatch is planned by A* (Hart et al., 1968) in a graph of devices and times, and collisions are
resolved by branching on who of the two must go another way (conflict-based search: Sharon et al.,
2015). What is minimised is the makespan of `routes.dispatch`:

  [1] few enough combinations of routes: all of them, so that the result is optimal
  [2] else one microbatch after the other, in the times left by earlier ones (prioritized planning)
  [3] branch on collisions, best plan first, the worst collision first, up to a bound on the work
  [4] again from other priorities; the best plan of all counts, the balanced one included
  [5] the rest of the work: random changes of the best plan that do not make it longer
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator

from jaxpipe.schedules.planning.routes import Network, Route, Routes, all_routes, balanced, dispatch

# Bounds on the work. The first is in passes dispatched, about a fifth of a second.
_WORK = 60_000
_RESTARTS = 4
# Planning grows with the sets of stages that a microbatch may have visited.
_MOST_SETS = 2_000
_COLLISIONS = 6


def find_routes(network: Network, *, seed: int = 0, work: int = _WORK) -> Routes:
  """Searches for routes of a short makespan.

  Args:
    network: devices, times and limits.
    seed: of the restarts; equal seeds give equal routes.
    work: bound on the search, in passes dispatched.

  Returns:
    Legal routes; optimal ones under the rule of `dispatch` where all combinations fit into `work`.

  Raises:
    ScheduleError: no routes meet the limits.
  """
  fallback = balanced(network)
  passes = 2 * network.microbatches * network.visits
  if work < 2 * passes:
    return fallback
  choices = list(itertools.islice(all_routes(network), work // passes + 1))
  if len(choices) ** network.microbatches * passes <= work:
    combinations = itertools.product(choices, repeat=network.microbatches)  # [1]
    return min(filter(network.allows, combinations), key=lambda r: dispatch(network, r).makespan)
  shuffle = random.Random(seed)
  order = list(range(network.microbatches))
  best = _Best(network, work // passes)
  best.offer(fallback)
  S, k = network.placement.stages, network.visits
  plans = math.comb(S - 1, k - 1) * k <= _MOST_SETS
  for _ in range(_RESTARTS if plans else 0):  # [4]
    if best.left <= 0:
      break
    planned = prioritized(network, order)
    if planned is not None:
      best.offer(planned)
      _branch(best, planned, best.left // 4)
    shuffle.shuffle(order)
  _climb(best, shuffle)  # [5]
  return best.routes


def _climb(best: "_Best", draw: random.Random) -> None:
  """[5] Changes the best plan at random, keeping what is no longer."""
  network, routes = best.network, best.routes
  M = network.microbatches
  now, misses = best.makespan, 0
  while M > 1 and best.left > 0 and misses < 100 * M:
    m, other = draw.sample(range(M), 2)
    misses += 1
    device = draw.choice(routes[m])
    options = list(_resolutions(network, routes, m, other, device))
    if not options:
      continue
    child = draw.choice(options)
    makespan, _ = best.offer(child)
    if makespan <= now:
      misses = 0 if makespan < now else misses
      routes, now = child, makespan


class _Best:
  """The best plan so far, and how many more may be tried.

  Attributes:
    network: the devices.
    left: number of plans that may still be tried.
    routes: the best plan; empty before the first.
    makespan: its makespan.
  """

  def __init__(self, network: Network, left: int) -> None:
    self.network, self.left = network, left
    self.routes: Routes = ()
    self.makespan = math.inf

  def offer(self, routes: Routes) -> tuple[float, list[tuple[float, int, int, int]]]:
    """Tries a plan, and returns its makespan and its collisions, the worst first."""
    self.left -= 1
    run = dispatch(self.network, routes)
    if not self.routes or run.makespan < self.makespan:
      self.routes, self.makespan = routes, run.makespan
    return run.makespan, sorted(run.collisions, reverse=True)


def _branch(best: _Best, root: Routes, budget: int) -> None:
  """[3] Searches best-first over plans that differ in the routes of two colliding microbatches."""
  stop = best.left - budget
  seen = {root}
  ticket = itertools.count()  # plans of one makespan are opened in the order in which they came
  open_plans = [_entry(best, root, ticket)]
  while open_plans and best.left > stop:
    _, _, routes, collisions = heapq.heappop(open_plans)
    for _, m, other, device in collisions[:_COLLISIONS]:
      for child in _resolutions(best.network, routes, m, other, device):
        if child not in seen and best.left > stop:
          seen.add(child)
          heapq.heappush(open_plans, _entry(best, child, ticket))


# An entry of the heap of open plans: makespan, ticket, plan, collisions.
_Entry = tuple[float, int, Routes, list[tuple[float, int, int, int]]]


def _entry(best: _Best, routes: Routes, ticket: "itertools.count[int]") -> _Entry:
  """Tries a plan and returns its entry of the heap."""
  makespan, collisions = best.offer(routes)
  return makespan, next(ticket), routes, collisions


def _resolutions(
  network: Network, routes: Routes, m: int, other: int, device: int
) -> Iterator[Routes]:
  """Yields plans in which one of two microbatches avoids the device on which they collide."""
  yield _with(routes, {m: routes[other], other: routes[m]})
  for one, two in ((m, other), (other, m)):
    for replacement in range(network.placement.devices):
      detour = _replace(network, routes[one], device, replacement)
      if detour is None:
        continue
      alone = _with(routes, {one: detour})
      if network.allows(alone):
        yield alone
      # Where every stage is visited as often as it may be, the other one takes over the visit.
      elif replacement in routes[two]:
        for home in network.placement.homes(network.stage(device)):
          back = _replace(network, routes[two], replacement, home)
          if back is not None:
            yield _with(routes, {one: detour, two: back})


def _with(routes: Routes, changes: dict[int, Route]) -> Routes:
  """Returns routes with those of some microbatches replaced."""
  return tuple(changes.get(m, route) for m, route in enumerate(routes))


def _replace(network: Network, route: Route, old: int, new: int) -> Route | None:
  """Returns a route with another device in place of one; None if that is no route."""
  if old not in route or new in route or (network.stage(old) == 0) != (network.stage(new) == 0):
    return None
  changed = [new if d == old else d for d in route]
  if len({network.stage(d) for d in changed}) < len(changed):
    return None
  return tuple(changed if network.reorder else sorted(changed, key=network.stage))


def prioritized(network: Network, order: list[int]) -> Routes | None:
  """[2] Plans microbatches one by one, earlier ones having the right of way.

  Args:
    network: devices, times and limits.
    order: the microbatches, most important first.

  Returns:
    The routes, or None if the caps leave the last microbatches no way.
  """
  taken: list[list[tuple[float, float]]] = [[] for _ in network.forward]
  counts = [0] * network.placement.stages
  found: dict[int, Route] = {}
  for i, m in enumerate(order):
    route = _shortest(network, taken, counts, len(order) - i - 1)
    if route is None:
      return None
    found[m] = route
    for d in route[1:]:
      counts[network.stage(d)] += 1
    _reserve(network, taken, route)
  return tuple(found[m] for m in range(len(order)))


def _shortest(
  network: Network, taken: list[list[tuple[float, float]]], counts: list[int], others: int
) -> Route | None:
  """Returns the route whose forward arrives first, between the times that are taken (A*)."""
  cheapest = min(network.forward)
  # Arriving earlier at the same device after the same stages is never worse: one may wait.
  closed: set[tuple[int, int]] = set()
  heap: list[tuple[float, float, int, Route]] = []
  for d in network.placement.homes(0):
    end = _slot(taken[d], 0, network.forward[d]) + network.forward[d]
    heap.append((end + (network.visits - 1) * (cheapest + network.hop), end, 1, (d,)))
  heapq.heapify(heap)
  while heap:
    _, now, mask, route = heapq.heappop(heap)
    if (mask, route[-1]) in closed:
      continue
    closed.add((mask, route[-1]))
    left = network.visits - len(route)
    if left == 0:
      if _leaves_enough(network, counts, mask, others):
        return route
      continue
    for d, forward in enumerate(network.forward):
      stage = network.stage(d)
      late = not network.reorder and stage < network.stage(route[-1])
      if mask >> stage & 1 or late or counts[stage] >= network.cap:
        continue
      end = _slot(taken[d], now + network.hop, forward) + forward
      bound = end + (left - 1) * (cheapest + network.hop)
      heapq.heappush(heap, (bound, end, mask | 1 << stage, (*route, d)))
  return None


def _leaves_enough(network: Network, counts: list[int], mask: int, others: int) -> bool:
  """Whether the microbatches still to come can make the visits that are left, and no others."""
  visits = [counts[s] + (mask >> s & 1) for s in range(1, len(counts))]
  most = sum(min(network.cap - count, others) for count in visits)
  lacking = [max(network.least - count, 0) for count in visits]
  # Each of them visits a stage at most once; within these bounds any numbers can be dealt.
  return sum(lacking) <= others * (network.visits - 1) <= most and max(lacking, default=0) <= others


def _reserve(network: Network, taken: list[list[tuple[float, float]]], route: Route) -> None:
  """Marks the first free times along a route and back as taken."""
  now: float = -network.hop
  for i, (d, times) in enumerate(
    [*((d, network.forward) for d in route), *((d, network.backward) for d in route[::-1])]
  ):
    hop = 0 if i == len(route) else network.hop  # turning round takes no hop
    start = _slot(taken[d], now + hop, times[d])
    now = start + times[d]
    taken[d].append((start, now))
    taken[d].sort()


def _slot(taken: list[tuple[float, float]], earliest: float, length: float) -> float:
  """Returns the first start from `earliest` on at which a time of `length` is free."""
  for begin, end in taken:
    if begin >= earliest + length:
      break
    earliest = max(earliest, end)
  return earliest
