"""Makes split-backward candidates of one stage per device forwards in time.

The engine of `zb_auto`: list scheduling (Graham, 1966) that knows one chunk only and is fast
enough to be run hundreds of times. Whenever a device ends something or something reaches it, it
takes the first that it can: the next I, the next F, or a W that delays neither.

  now            [1] I is there, F is there: I first, or F first while few are in flight
   v             [2] F is there, memory is full: a W, which gives some back
   ....| W |F    [3] neither is there: a W, if it ends before the next arrives or may delay it
   ....|idle|I   [4] else wait

A policy says how many forwards may be in flight, what delay a W is worth and how many of them to
keep for later; none is right for all costs and limits.
"""

import dataclasses
import heapq
import math

from jaxpipe.schedules.solver.problem import Problem, Words

F, I, W = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """The rules by which devices choose their next action.

  Attributes:
    depth: P numbers, the most forwards that each device has in flight.
    strict: whether `depth` always holds; else not while a device has nothing else to do or expect.
    patience: share of a W by which it may delay an action that is known to arrive.
    kept: P numbers of weight gradients that each device keeps for gaps that hold them whole.
    ahead: P numbers of forwards in flight below which each device takes an F before an I.
  """

  depth: tuple[int, ...]
  strict: bool
  patience: float
  kept: tuple[int, ...]
  ahead: tuple[int, ...]


@dataclasses.dataclass(kw_only=True)
class _Device:
  """One device of a plan in the making.

  Attributes:
    times: durations of its F, I and W.
    changes: changes of the memory that it holds by its F, I and W.
    limit: most memory that it may hold; infinite without a limit.
    depth, kept, ahead: its entries of the policy.
    arrived_f: when the input of each microbatch comes, for those known.
    arrived_i: when the output gradient of each microbatch comes, for those known.
    word: numbers of the kinds that it has run, in order.
    count: number of F, I and W that it has run.
    held: memory that it holds now.
    free: when it has ended what it does now.
  """

  times: tuple[int, int, int]
  changes: tuple[int, int, int]
  limit: float
  depth: int
  kept: int
  ahead: int
  arrived_f: list[int]
  arrived_i: list[int] = dataclasses.field(default_factory=list)
  word: list[int] = dataclasses.field(default_factory=list)
  count: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
  held: int = 0
  free: int = 0


def fill(problem: Problem, policy: Policy) -> Words | None:
  """Makes words by a policy.

  Args:
    problem: letters, times and limits, on one stage per device.
    policy: the rules by which devices choose.

  Returns:
    One word per device, within the limits if an F gives all back at the latest by its W; None if
    the policy ran into a dead end.
  """
  devices = _devices(problem, policy)
  last = len(devices) - 1
  events = [(0, d) for d in range(len(devices))]
  while events:
    now, d = heapq.heappop(events)
    device = devices[d]
    # Everything that happens now comes in before anybody chooses.
    if device.free > now or (events and events[0] == (now, d)):
      continue
    kind, wait = _choose(device, now, policy)
    if kind is None:
      if wait < math.inf:
        heapq.heappush(events, (int(wait), d))
      continue
    end = _take(device, kind, now)
    heapq.heappush(events, (end, d))
    reader = d + 1 if kind == F else d - 1
    if kind == F and d == last:
      device.arrived_i.append(end)
    elif kind != W and reader >= 0:
      arrived = devices[reader].arrived_f if kind == F else devices[reader].arrived_i
      arrived.append(end + problem.hop)
      heapq.heappush(events, (end + problem.hop, reader))
  if any(len(device.word) < 3 * problem.microbatches for device in devices):
    return None
  # Letters count stages within a kind.
  return [[k * len(devices) + d for k in device.word] for d, device in enumerate(devices)]


def _devices(problem: Problem, policy: Policy) -> list[_Device]:
  """Returns all devices before their first action; the first has the data of all microbatches."""
  P, M = problem.placement.devices, problem.microbatches
  return [
    _Device(
      times=_of(problem.times, d, P),
      changes=_of(problem.changes, d, P),
      limit=math.inf if problem.limits is None else problem.limits[d],
      depth=policy.depth[d],
      kept=policy.kept[d],
      ahead=policy.ahead[d],
      arrived_f=[] if d else [0] * M,
    )
    for d in range(P)
  ]


def _of(letters: tuple[int, ...], d: int, P: int) -> tuple[int, int, int]:
  """Returns the numbers of device d's F, I and W."""
  return letters[d], letters[P + d], letters[2 * P + d]


def _take(device: _Device, kind: int, now: int) -> int:
  """Starts an action, and returns when it ends."""
  device.word.append(kind)
  device.count[kind] += 1
  device.held += device.changes[kind]
  device.free = now + device.times[kind]
  return device.free


def _choose(device: _Device, now: int, policy: Policy) -> tuple[int | None, float]:
  """Returns the kind to start now, or None and until when to wait.

  An infinite wait lasts until something arrives.
  """
  f, i, w = device.count
  arrived_f, arrived_i = device.arrived_f, device.arrived_i
  at_next_f = arrived_f[f] if f < len(arrived_f) else math.inf
  at_f = at_next_f if f - i < device.depth else math.inf
  at_i = arrived_i[i] if i < len(arrived_i) else math.inf
  left = device.limit - device.held
  # Enough for the I that follows as well, so that memory always comes back.
  fits = device.changes[F] + max(0, device.changes[I]) <= left
  if at_i <= now and not (at_f <= now and fits and f - i < device.ahead):  # [1]
    return (I if device.changes[I] <= left or w == i else W), 0
  if at_f <= now and fits:
    return F, 0
  if w < i:
    if at_f <= now:
      return W, 0  # [2]
    soon = min(at_f, at_i)
    time = device.times[W]
    spare = i - w > device.kept or soon == math.inf
    if now + time <= soon or (spare and now + time * (1 - policy.patience) <= soon):  # [3]
      return W, 0
  elif not policy.strict and at_next_f <= now and fits and at_i == math.inf:
    return F, 0
  return None, min((at for at in (at_f, at_i) if at > now), default=math.inf)  # [4]
