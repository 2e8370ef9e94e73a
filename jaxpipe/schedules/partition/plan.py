"""The result of a search for a partition: the partition, its schedule, and a report on both."""

import dataclasses
import math

from jaxpipe.schedules.partition.orders import memory
from jaxpipe.schedules.partition.partition import Partition, aligned
from jaxpipe.schedules.simulate import Timeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The best partition found for a schedule.

  Attributes:
    partition: which layers are which stage.
    timeline: the schedule, simulated with the times of the stages.
    hop: latency between two devices, with the time that the widest boundary takes to send.
    limits: P limits, the most memory that each device may hold; infinite without a limit.
    lower_bound: a time that the makespan of no partition can go below.
    proven: whether no other partition has a shorter makespan.
    uniform: makespan with equally many layers in every stage, within the limits or not; None where
      there is no schedule for it.
    looked: number of partitions and beginnings of them that were looked at.
  """

  partition: Partition
  timeline: Timeline
  hop: float
  limits: tuple[float, ...]
  lower_bound: float
  proven: bool
  uniform: float | None
  looked: int

  @property
  def makespan(self) -> float:
    """Simulated time of a step."""
    return self.timeline.makespan

  @property
  def gap(self) -> float:
    """Share of the makespan by which an unknown partition might still be shorter; 0 if proven."""
    return 0.0 if self.proven or not self.makespan else 1 - self.lower_bound / self.makespan

  @property
  def gain(self) -> float:
    """Share of the uniform partition's makespan that is saved."""
    return 1 - self.makespan / self.uniform if self.uniform else 0.0

  @property
  def memory(self) -> tuple[float, ...]:
    """The most memory that each device holds: parameters, and activations at their peak."""
    return memory(self.partition, self.timeline.schedule)

  def report(self) -> str:
    """Returns makespan, bubble, proof, stages and devices as text."""
    timeline = self.timeline
    proof = "proven best" if self.proven else f"at most {self.gap:.2%} above the best"
    uniform = "none" if self.uniform is None else f"{self.uniform:.6g}, {self.gain:.1%} saved"
    rows = [("device", "stages", "busy", "idle", "parameters", "peak", "holds", "limit")]
    for d, (held, limit) in enumerate(zip(self.memory, self.limits, strict=True)):
      stages = timeline.schedule.placement.table[d]
      busy, peak = timeline.busy[d], timeline.peak_memory[d]
      idle = 1 - busy / self.makespan if self.makespan else 0
      rows.append(
        (
          str(d),
          " ".join(map(str, stages)),
          f"{busy:.6g}",
          f"{idle:.1%}",
          f"{held - peak:.6g}",
          f"{peak:.6g}",
          f"{held:.6g}",
          "none" if math.isinf(limit) else f"{limit:.6g}",
        )
      )
    return "\n".join(
      [
        f"{timeline.schedule.name} P={len(timeline.busy)} M={timeline.schedule.microbatches}:"
        f" makespan {self.makespan:.6g}, bubble {timeline.bubble:.1%}, {proof}",
        f"uniform partition: {uniform}",
        str(self.partition),
        *aligned(rows),
      ]
    )
