"""The lanes of list scheduling, and when memory allows them to go on.

A *lane* is one stage on one device with the microbatches that it runs; a stage with two replicas
has two lanes. Within a lane microbatches never overtake each other, which makes limits safe to
keep: an F starts only if afterwards the oldest microbatch on its device, then the next, and so on,
could still get all of their chunks (the banker's algorithm, Dijkstra, 1965). The oldest microbatch
of all is then never stuck on any device, so that no limit that one microbatch fits into can
dead-lock.

  limit 4, chunks 0 and 5     held: 0F0 0F1      room 2
  0F2?  room 1 is left; microbatch 0 needs one for its 5F0 and then gives back two: safe
  0F3?  no room would be left, and microbatch 0 could never come back: not safe
"""

import math
from collections.abc import Mapping, Sequence

from jaxpipe.schedules.actions import Kind
from jaxpipe.schedules.costs import Costs, Memory, memory_changes
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule

# What a device runs: for each of its stages, the microbatches in the order in which they come.
Work = Sequence[Mapping[int, Sequence[int]]]

# The position of a kind in this list is its number elsewhere in these two modules.
KINDS = (Kind.F, Kind.I, Kind.W)
F, I, W = range(3)


def smallest_limit(placement: Placement, memory: Memory = (1, 0, -1)) -> float:
  """The least memory with which `list_schedule` gets through: one microbatch on any device."""
  changes = _changes(memory, placement.stages)
  return max(_footprint(row, changes)[1] for row in placement.table)


def _changes(memory: Memory, stages: int) -> list[tuple[float, ...]]:
  changes = memory_changes(memory, stages)
  return [changes[kind] for kind in KINDS]


def _footprint(held: Sequence[int], changes: Sequence[Sequence[float]]) -> tuple[float, float]:
  """A device's head room for Is that add memory, and what one microbatch needs with it."""
  forward, input_grad, _ = changes
  # Where an I adds memory, W follows at once if need be: room for a single one is enough.
  growth = max(0, *(input_grad[s] for s in held))
  return growth, sum(forward[s] for s in held) + growth


class Lane:
  """One stage on one device: three heads that walk along its microbatches."""

  __slots__ = ("arrivals", "cap", "device", "grads", "heads", "microbatches", "stage")

  def __init__(self, device: int, stage: int, microbatches: Sequence[int], cap: float) -> None:
    self.device, self.stage, self.cap = device, stage, cap
    self.microbatches = list(microbatches)
    self.heads = [0, 0, 0]  # of F, I and W
    # When the input and the output gradient of each microbatch come; infinite while unknown.
    self.arrivals = dict.fromkeys(self.microbatches, 0 if stage == 0 else math.inf)
    self.grads = dict.fromkeys(self.microbatches, math.inf)


class State:
  """What `_run` moves forward in time."""

  def __init__(
    self,
    placement: Placement,
    work: Work,
    in_flight: Sequence[float] | None,
    costs: Costs,
    memory: Memory,
    limit: float | Sequence[float] | None,
  ) -> None:
    self.hop = costs.hop
    self.stages = placement.stages
    microbatches = 1 + max(m for row in work for lane in row.values() for m in lane)
    # Of a schedule without actions: what they take depends on the sizes alone.
    empty = Schedule("", placement, microbatches, ((),) * placement.devices)
    durations = costs.all_durations(empty)
    self.durations = [durations[kind] for kind in KINDS]
    self.changes = _changes(memory, self.stages)
    caps = in_flight or (math.inf,) * self.stages
    self.lanes = [[Lane(d, s, row[s], caps[s]) for s in row] for d, row in enumerate(work)]
    self.lane_of = {(a.stage, m): a for row in self.lanes for a in row for m in a.microbatches}
    limit = math.inf if limit is None else limit
    self.limits = list(limit) if isinstance(limit, Sequence) else [limit] * len(work)
    self.held: list[float] = [0] * len(work)
    self.needs = [_footprint(list(row), self.changes) for row in work]
    for d, (most, (_, need)) in enumerate(zip(self.limits, self.needs, strict=True)):
      if need > most:
        raise ValueError(
          f"one microbatch holds {need} on device {d}, above memory_limit={most};"
          f" use memory_limit={smallest_limit(placement, memory)} or more"
        )


def fits(state: State, lane: Lane, which: int, *, ranked: bool) -> bool:
  """Whether memory allows the lane's next F or I, now and for all that is under way.

  Where an order is prescribed (`ranked`) it is not looked ahead: some that work would be refused.
  """
  d = lane.device
  room = state.limits[d] - state.held[d] - state.changes[which][lane.stage]
  if which == I or ranked:
    return room >= 0
  if lane.heads[F] - lane.heads[W] >= lane.cap:
    return False
  growth, need = state.needs[d]
  room -= growth
  # With room for a whole microbatch nobody can get stuck.
  return room >= need or (room >= 0 and _is_safe(state, lane, room, need))


def _is_safe(state: State, starting: Lane, room: float, need: float) -> bool:
  """Whether, after an F, microbatches could be finished one after another in the room there is."""
  lanes = state.lanes[starting.device]
  forward = state.changes[F]
  # Next F and next W of every lane, as if the F had started already.
  heads = [[a.heads[F] + (a is starting), a.heads[W]] for a in lanes]
  while room < need:
    pairs = list(zip(lanes, heads, strict=True))
    under_way = [a.microbatches[w] for a, (f, w) in pairs if w < f]
    if not under_way:
      return True
    oldest = min(under_way)
    # Some lane may be about to run an even older one, which the others are through with.
    waiting = [a.microbatches[f] for a, (f, _) in pairs if f < len(a.microbatches)]
    oldest = min([oldest, *waiting])
    missing = given = 0.0
    for lane, head in pairs:
      if head[0] < len(lane.microbatches) and lane.microbatches[head[0]] == oldest:
        missing += forward[lane.stage]
        head[0] += 1
      if head[1] < head[0] and lane.microbatches[head[1]] == oldest:
        given += forward[lane.stage]
        head[1] += 1
    if missing > room:
      return False
    room += given - missing
  return True
