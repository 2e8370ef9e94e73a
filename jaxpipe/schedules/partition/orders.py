"""How a schedule answers for a partition: its value, and linear functions that bound it.

Most schedules are one order whatever stages cost (`FixedOrder`): their makespan is the largest of
the order's paths, each a row, and memory the largest of what a device holds at any moment. Some
plan around the costs (`PlannedOrder`); for these there are rows that hold for every order, below
which they cannot plan.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from jaxpipe.schedules.actions import Kind
from jaxpipe.schedules.partition.critical import CriticalPaths, PathWeights
from jaxpipe.schedules.partition.partition import Partition
from jaxpipe.schedules.partition.rows import Row
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate

# What a row weighs, in this order.
RESOURCES = ("forward", "input_grad", "weight_grad", "parameters", "activations")
# Builds the schedule of a partition; a ValueError says that it has none.
Factory = Callable[[Partition], Schedule]


class Order(Protocol):
  """What `best` asks of a schedule."""

  placement: Placement
  microbatches: int
  price: int  # of asking for a makespan, in beginnings of partitions looked at

  def rows(self) -> list[Row]:
    """Linear functions that the makespan is never below, of every partition."""

  def memory_rows(self, limits: Sequence[float]) -> list[Row]:
    """Conditions that every partition within the limits meets."""

  def makespan(self, partition: Partition) -> float:
    """The makespan, infinite where there is no schedule."""

  def decisive(self, partition: Partition) -> Row | None:
    """The row that is the makespan of this partition, where there is one."""

  def schedule(self, partition: Partition) -> Schedule:
    """The schedule of the partition."""


class FixedOrder:
  """One order, whatever the costs."""

  price = 1

  def __init__(self, schedule: Schedule, hop: float) -> None:
    """Lays the order's waits out."""
    self.placement, self.microbatches = schedule.placement, schedule.microbatches
    self._schedule, self._paths = schedule, CriticalPaths(schedule, hop)

  def rows(self) -> list[Row]:
    """A path for each device, which it decides where it is the slowest, and the mean of these."""
    rows = [_path_row(*path) for path in self._paths.device_paths()]
    return [*rows, *(mean(rows[d:]) for d in range(len(rows) - 1))]

  def memory_rows(self, limits: Sequence[float]) -> list[Row]:
    """What each device holds at every moment that no other one contains."""
    return [
      _memory_row(self.placement, d, counts, limit)
      for d, limit in enumerate(limits)
      for counts in _moments(self._schedule, d)
    ]

  def makespan(self, partition: Partition) -> float:
    """The longest path."""
    return self._paths.makespan(_loads(partition))

  def decisive(self, partition: Partition) -> Row | None:
    """The longest path as a row."""
    return _path_row(*self._paths.path(_loads(partition)))

  def schedule(self, partition: Partition) -> Schedule:
    """The same for all."""
    return self._schedule


class PlannedOrder:
  """An order that is planned around the costs."""

  price = 100

  def __init__(
    self, factory: Factory, hop: float, example: Schedule, limits: Sequence[float]
  ) -> None:
    """Takes sizes and placement from an example."""
    self.placement, self.microbatches = example.placement, example.microbatches
    self._factory, self._hop, self._limits = factory, hop, limits
    self._routed = example.paths is not None

  def rows(self) -> list[Row]:
    """The mean device's work; and one microbatch's way and each device's work between its ends."""
    if self._routed:  # who leaves stages out is bound by none of these
      return [Row(weights=((0.0,) * 5,) * self.placement.stages)]
    S, P, M = self.placement.stages, self.placement.devices, self.microbatches
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
    """Forwards on the way to it, its work, and either its last W or the gradients' way home."""
    M, held = self.microbatches, self.placement.table[d]
    first, way = min(held), self._hops(0, min(held))
    for home in (False, True):
      weights = [[0.0] * 5 for _ in range(self.placement.stages)]
      for s in range(first):
        weights[s][:2] = [1, float(home)]
      for s in held:
        weights[s][:3] = [M, M, M * (not home)]
      weights[0][2] += home
      yield Row(weights=tuple(map(tuple, weights)), constant=way * (1 + home))

  def _hops(self, first: int, last: int) -> float:
    """Time between devices from one stage to a later one."""
    if self.placement.replicated:
      return 0
    device = self.placement.device
    return self._hop * sum(device(s) != device(s + 1) for s in range(first, last))

  def memory_rows(self, limits: Sequence[float]) -> list[Row]:
    """One microbatch on each of its stages: it has left none before its first gradient there."""
    if self._routed:
      return []
    once = [0 if self.placement.replicated else 1] * self.placement.stages
    return [_memory_row(self.placement, d, once, limit) for d, limit in enumerate(limits)]

  def makespan(self, partition: Partition) -> float:
    """That of the schedule which is planned for it, if that keeps to the limits."""
    try:
      schedule = self._factory(partition)
    except ValueError:
      return float("inf")
    held = memory(partition, schedule)
    if any(x > limit for x, limit in zip(held, self._limits, strict=True)):
      return float("inf")
    return simulate(schedule, partition.costs(self._hop)).makespan

  def decisive(self, partition: Partition) -> None:
    """None: another partition's order may have no such path."""
    return None

  def schedule(self, partition: Partition) -> Schedule:
    """Planned for it."""
    return self._factory(partition)


def mean(rows: Sequence[Row]) -> Row:
  """The mean of rows, which is never above the largest of them."""
  n = len(rows)
  return Row(
    weights=tuple(
      tuple(sum(column) / n for column in zip(*stage, strict=True))
      for stage in zip(*(row.weights for row in rows), strict=True)
    ),
    constant=sum(row.constant for row in rows) / n,
  )


def memory(partition: Partition, schedule: Schedule) -> tuple[float, ...]:
  """What each device holds at most: its stages' parameters, and activations at their peak."""
  stages = partition.stages
  return tuple(
    sum(stages[s].parameters for s in row) + peak
    for row, peak in zip(
      schedule.placement.table, peaks(schedule, partition.memory).memory, strict=True
    )
  )


def _loads(partition: Partition) -> list[tuple[float, float, float]]:
  return [(s.forward, s.input_grad, s.weight_grad) for s in partition.stages]


def _path_row(weights: PathWeights, hops: float) -> Row:
  return Row(weights=tuple((*stage, 0, 0) for stage in weights), constant=hops)


def _memory_row(placement: Placement, d: int, counts: Sequence[int], limit: float) -> Row:
  held = placement.table[d]
  return Row(
    weights=tuple((0, 0, 0, 1, n) if s in held else (0,) * 5 for s, n in enumerate(counts)),
    limit=limit,
  )


def _moments(schedule: Schedule, d: int) -> list[tuple[int, ...]]:
  """How many microbatches a device holds of each stage, where no other moment has as many of all.

  A moment counts with what comes later only if that frees something, so only peaks do.
  """
  change = {Kind.F: 1, Kind.W: -1, Kind.B: -1}
  counts = [0] * schedule.stages
  found: list[tuple[int, ...]] = []
  for step in schedule.order[d]:
    for part in step.parts:
      counts[part.stage] += change.get(part.kind, 0)
      now = tuple(counts)
      if not any(all(a >= b for a, b in zip(other, now, strict=True)) for other in found):
        found = [o for o in found if not all(b >= a for a, b in zip(o, now, strict=True))]
        found.append(now)
  return found
