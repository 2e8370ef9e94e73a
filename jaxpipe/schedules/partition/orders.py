"""The makespan of a schedule as a function of the partition, and linear bounds on it.

The search for a partition asks two questions of a schedule: how long is a step with this partition,
and which linear functions of the stages' sums (rows) is the makespan never below?

  FixedOrder    one order, whatever stages cost: the makespan is the largest of the order's paths,
                each a row, and memory is the largest sum that a device holds at any moment
  PlannedOrder  an order planned around the costs: rows that bound every order that there is
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from jaxpipe.schedules.kinds import CHUNKS_HELD
from jaxpipe.schedules.partition.critical import CriticalPaths, PathWeights
from jaxpipe.schedules.partition.partition import Partition
from jaxpipe.schedules.partition.rows import Row
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate

# The sums over a stage's layers that a row has factors for, in the order of the factors.
RESOURCES = ("forward", "input_grad", "weight_grad", "parameters", "activations")
# Builds the schedule of a partition; raises ValueError where there is none.
Factory = Callable[[Partition], Schedule]


class Order(Protocol):
  """The questions that the search for a partition asks of a schedule.

  Attributes:
    placement: where the S stages live on P devices.
    microbatches: number of microbatches, M.
    price: what asking for a makespan counts as, in beginnings of partitions looked at.
  """

  placement: Placement
  microbatches: int
  price: int

  def rows(self) -> list[Row]:
    """Returns linear functions of a partition that its makespan is never below."""

  def memory_rows(self, limits: Sequence[float]) -> list[Row]:
    """Returns conditions that every partition within P memory limits meets."""

  def makespan(self, partition: Partition) -> float:
    """Returns the makespan of a partition into S stages, infinite where there is no schedule."""

  def decisive(self, partition: Partition) -> Row | None:
    """Returns the row that equals the makespan of a partition, None where no row is known to."""

  def schedule(self, partition: Partition) -> Schedule:
    """Returns the schedule that runs a partition; raises ValueError where there is none."""


class FixedOrder:
  """A schedule whose order is the same for every partition."""

  price = 1

  def __init__(self, schedule: Schedule, hop: float) -> None:
    """Walks the order once.

    Args:
      schedule: a legal schedule of passes through stages.
      hop: latency between two devices.
    """
    self.placement, self.microbatches = schedule.placement, schedule.microbatches
    self._schedule, self._paths = schedule, CriticalPaths(schedule, hop)

  def rows(self) -> list[Row]:
    """Returns a path for each device, longest where that one is the slowest, and means of these."""
    rows = [_path_row(*path) for path in self._paths.device_paths()]
    return [*rows, *(mean(rows[d:]) for d in range(len(rows) - 1))]

  def memory_rows(self, limits: Sequence[float]) -> list[Row]:
    """Returns what each device holds, at every moment that is not contained in another one."""
    return [
      _memory_row(self.placement, d, counts, limit)
      for d, limit in enumerate(limits)
      for counts in _moments(self._schedule, d)
    ]

  def makespan(self, partition: Partition) -> float:
    """Returns the length of the longest path."""
    return self._paths.makespan(_loads(partition))

  def decisive(self, partition: Partition) -> Row | None:
    """Returns the longest path as a row."""
    return _path_row(*self._paths.path(_loads(partition)))

  def schedule(self, partition: Partition) -> Schedule:
    """Returns the one schedule, which runs every partition."""
    return self._schedule


class PlannedOrder:
  """A schedule whose order is planned anew around the costs of every partition."""

  price = 100

  def __init__(
    self, factory: Factory, hop: float, example: Schedule, limits: Sequence[float]
  ) -> None:
    """Takes sizes and placement from an example.

    Args:
      factory: plans the schedule of a partition.
      hop: latency between two devices.
      example: a schedule that it has planned, for whatever costs.
      limits: P limits, the most memory that each device may hold.
    """
    self.placement, self.microbatches = example.placement, example.microbatches
    self._factory, self._hop, self._limits = factory, hop, limits
    self._routed = example.paths is not None

  def rows(self) -> list[Row]:
    """Returns bounds on every order: the mean work, one microbatch's path, each device's work."""
    # A microbatch that leaves stages out is bound by none of these.
    if self._routed:
      return [Row(weights=((0.0,) * 5,) * self.placement.stages)]
    S, P, M = self.placement.stages, self.placement.devices, self.microbatches
    # Sums over devices: on average a device does each stage's work for M / P microbatches.
    share = M / P
    way = tuple((1, 1, int(s == 0), 0, 0) for s in range(S))
    rows = [
      Row(weights=((share, share, share, 0, 0),) * S),
      Row(weights=way, constant=2 * self._hops(0, S - 1)),
    ]
    if not self.placement.replicated:
      rows += [row for d in range(P) for row in self._device(d)]
    return rows

  def _device(self, d: int) -> Iterator[Row]:
    """Yields the bounds of device d: the path to it, its work, then its last W or the path back."""
    M, held = self.microbatches, self.placement.table[d]
    first, way = min(held), self._hops(0, min(held))
    for home in (False, True):
      # Before its first F, one microbatch has passed all stages before; after its last I, either
      # the device's Ws are left, or that gradient's way back to stage 0, and the W there.
      weights = [[0.0] * 5 for _ in range(self.placement.stages)]
      for s in range(first):
        weights[s][:2] = [1, float(home)]
      for s in held:
        weights[s][:3] = [M, M, M * (not home)]
      weights[0][2] += home
      yield Row(weights=tuple(map(tuple, weights)), constant=way * (1 + home))

  def _hops(self, first: int, last: int) -> float:
    """Returns the time of all hops between devices from one stage to a later one."""
    if self.placement.replicated:
      return 0
    device = self.placement.device
    return self._hop * sum(device(s) != device(s + 1) for s in range(first, last))

  def memory_rows(self, limits: Sequence[float]) -> list[Row]:
    """Returns the memory of one microbatch on all stages of each device, which no order avoids.

    A device's first gradient comes after that microbatch's forwards on all of its stages.
    """
    if self._routed:
      return []
    once = [0 if self.placement.replicated else 1] * self.placement.stages
    return [_memory_row(self.placement, d, once, limit) for d, limit in enumerate(limits)]

  def makespan(self, partition: Partition) -> float:
    """Returns the makespan of the schedule planned for a partition, infinite above the limits."""
    try:
      schedule = self._factory(partition)
    except ValueError:
      return float("inf")
    held = memory(partition, schedule)
    if any(x > limit for x, limit in zip(held, self._limits, strict=True)):
      return float("inf")
    return simulate(schedule, partition.costs(self._hop)).makespan

  def decisive(self, partition: Partition) -> None:
    """Returns None: the order of another partition may not have this one's longest path."""
    return None

  def schedule(self, partition: Partition) -> Schedule:
    """Plans the schedule of a partition."""
    return self._factory(partition)


def mean(rows: Sequence[Row]) -> Row:
  """Returns the mean of rows, which is never above the largest of them."""
  n = len(rows)
  return Row(
    weights=tuple(
      tuple(sum(column) / n for column in zip(*stage, strict=True))
      for stage in zip(*(row.weights for row in rows), strict=True)
    ),
    constant=sum(row.constant for row in rows) / n,
  )


def memory(partition: Partition, schedule: Schedule) -> tuple[float, ...]:
  """Returns the most memory that each device holds.

  Args:
    partition: parameters and activations of S stages.
    schedule: a schedule of as many stages.

  Returns:
    P amounts: the parameters of a device's stages, and its activations at their peak.
  """
  stages = partition.stages
  return tuple(
    sum(stages[s].parameters for s in row) + peak
    for row, peak in zip(
      schedule.placement.table, peaks(schedule, partition.memory).memory, strict=True
    )
  )


def _loads(partition: Partition) -> list[tuple[float, float, float]]:
  """Returns the durations of F, I and W of each stage."""
  return [(s.forward, s.input_grad, s.weight_grad) for s in partition.stages]


def _path_row(weights: PathWeights, hops: float) -> Row:
  """Returns a path as a row of the objective, which weighs no memory."""
  return Row(weights=tuple((*stage, 0, 0) for stage in weights), constant=hops)


def _memory_row(placement: Placement, d: int, counts: Sequence[int], limit: float) -> Row:
  """Returns the condition that device d may hold its parameters and some numbers of microbatches.

  Args:
    placement: where the stages live.
    d: the device.
    counts: S numbers of microbatches, by stage.
    limit: most memory that the device may hold.
  """
  held = placement.table[d]
  return Row(
    weights=tuple((0, 0, 0, 1, n) if s in held else (0,) * 5 for s, n in enumerate(counts)),
    limit=limit,
  )


def _moments(schedule: Schedule, d: int) -> list[tuple[int, ...]]:
  """Returns the moments of device d that matter to its memory.

  A moment is the number of microbatches held of each stage. Where another moment has as many of
  every stage, or more, it is left out: what that one needs includes what this one needs.
  """
  counts = [0] * schedule.stages
  found: list[tuple[int, ...]] = []
  for step in schedule.order[d]:
    for part in step.parts:
      counts[part.stage] += CHUNKS_HELD.get(part.kind, 0)
      now = tuple(counts)
      if not any(all(a >= b for a, b in zip(other, now, strict=True)) for other in found):
        found = [o for o in found if not all(b >= a for a, b in zip(o, now, strict=True))]
        found.append(now)
  return found
