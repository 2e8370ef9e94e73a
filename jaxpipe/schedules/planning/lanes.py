"""The lanes of list scheduling, and the rule by which a memory limit never dead-locks them.

A *lane* is one stage on one device with the microbatches that it runs; a stage with two replicas
has two lanes. Within a lane microbatches never overtake each other, which makes limits safe to
keep: an F starts only if afterwards the oldest microbatch on its device, then the next, and so on,
could still get all of their chunks (the banker's algorithm, Dijkstra, 1965). The oldest microbatch
of all is then never stuck on any device, so that no limit that one microbatch fits into can
dead-lock.

  limit 4, stages 0 and 5     held: 0F0 0F1      2 left
  0F2?  leaves 1; microbatch 0 needs that for its 5F0 and then gives back two: safe
  0F3?  leaves none, and microbatch 0 could never run 5F0: not safe
"""

import math
from collections.abc import Mapping, Sequence

from jaxpipe.schedules.costs import Costs, Memory, memory_changes
from jaxpipe.schedules.kinds import REQUIRED
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule

# For each device and each of its stages, its microbatches in the order in which they come.
Work = Sequence[Mapping[int, Sequence[int]]]

# Positions of the kinds in `REQUIRED`, their numbers in this module and in `list_schedule`.
F, I, W = range(3)


def smallest_limit(placement: Placement, memory: Memory = (1, 0, -1)) -> float:
  """Returns the least memory limit that `list_schedule` can keep to.

  Args:
    placement: where the stages live.
    memory: changes of the memory that a device holds by F, I and W.

  Returns:
    The most that one microbatch holds on any device.
  """
  changes = _changes(memory, placement.stages)
  return max(_footprint(row, changes)[1] for row in placement.table)


def _changes(memory: Memory, stages: int) -> list[tuple[float, ...]]:
  """Returns the changes by F, I and W, each by stage."""
  changes = memory_changes(memory, stages)
  return [changes[kind] for kind in REQUIRED]


def _footprint(held: Sequence[int], changes: Sequence[Sequence[float]]) -> tuple[float, float]:
  """Returns the memory that a device keeps free for an I, and what one microbatch needs with it."""
  forward, input_grad, _ = changes
  # Where an I adds memory, W follows at once if need be: enough for a single I will do.
  growth = max(0, *(input_grad[s] for s in held))
  return growth, sum(forward[s] for s in held) + growth


class Lane:
  """One stage on one device: three heads that walk along its microbatches.

  Attributes:
    device, stage: where the lane is.
    cap: most microbatches that it may hold from F to W.
    microbatches: the microbatches that it runs, in order.
    heads: for F, I and W, the position in `microbatches` of the next one.
    arrivals: microbatch -> when its input comes; infinite while unknown.
    grads: microbatch -> when its output gradient comes; infinite while unknown.
  """

  __slots__ = ("arrivals", "cap", "device", "grads", "heads", "microbatches", "stage")

  def __init__(self, device: int, stage: int, microbatches: Sequence[int], cap: float) -> None:
    self.device, self.stage, self.cap = device, stage, cap
    self.microbatches = list(microbatches)
    self.heads = [0, 0, 0]
    # The first stage reads data, which is there from the beginning.
    self.arrivals = dict.fromkeys(self.microbatches, 0 if stage == 0 else math.inf)
    self.grads = dict.fromkeys(self.microbatches, math.inf)


class State:
  """The state of all lanes, which `list_schedule` moves forward in time.

  Attributes:
    hop: latency between two devices.
    stages: number of stages, S.
    durations: times of F, I and W, each by stage.
    changes: changes of the memory that a device holds by F, I and W, each by stage.
    lanes: the lanes of each device.
    lane_of: (stage, microbatch) -> the lane that runs it.
    limits: most memory that each device may hold, infinite without a limit.
    held: memory that each device holds now.
    needs: `_footprint` of each device.
  """

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
    # A schedule without actions is enough: durations depend on the sizes alone.
    empty = Schedule("", placement, microbatches, ((),) * placement.devices)
    durations = costs.all_durations(empty)
    self.durations = [durations[kind] for kind in REQUIRED]
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
  """Returns whether memory allows a lane's next F or I, so that everything begun can still end.

  Args:
    state: all lanes.
    lane: the lane that would go on.
    which: F or I.
    ranked: whether the order of F and I is prescribed. Then only the present is looked at: looking
      ahead would refuse some orders that work.
  """
  d = lane.device
  left = state.limits[d] - state.held[d] - state.changes[which][lane.stage]
  if which == I or ranked:
    return left >= 0
  if lane.heads[F] - lane.heads[W] >= lane.cap:
    return False
  growth, need = state.needs[d]
  left -= growth
  # While a whole microbatch still fits, nobody can get stuck.
  return left >= need or (left >= 0 and _is_safe(state, lane, left, need))


def _is_safe(state: State, starting: Lane, left: float, need: float) -> bool:
  """Whether, after an F, the microbatches of a device could end one after another.

  This is the banker's algorithm: the oldest microbatch gets all of its chunks from the memory that
  is left, gives them back, and so on until a whole microbatch fits or none is under way.
  """
  lanes = state.lanes[starting.device]
  forward = state.changes[F]
  # Next F and next W of every lane, as if the F had started already.
  heads = [[a.heads[F] + (a is starting), a.heads[W]] for a in lanes]
  while left < need:
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
    if missing > left:
      return False
    left += given - missing
  return True
