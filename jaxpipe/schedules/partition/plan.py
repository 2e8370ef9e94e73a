"""A partition with the schedule that runs it: what `best` finds, and what it says about it."""

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
    timeline: the schedule with the stages' own times, and the schedule itself in it.
    hop: time of sending between two devices, the widest boundary's included.
    limits: most that each device may hold; infinite without a limit.
    lower_bound: what the makespan of no partition can go below.
    proven: whether the makespan is that of the best partition there is.
    uniform: makespan of as many layers in every stage, in memory's limits or not; None where
      there is no schedule for it.
    looked: what was spent of the effort.
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
    """How much shorter, as a share, an unknown partition might still be; 0 if proven."""
    return 0.0 if self.proven or not self.makespan else 1 - self.lower_bound / self.makespan

  @property
  def gain(self) -> float:
    """Share of the uniform partition's makespan that is saved."""
    return 1 - self.makespan / self.uniform if self.uniform else 0.0

  @property
  def memory(self) -> tuple[float, ...]:
    """Most that each device holds: parameters, and activations at their peak."""
    return memory(self.partition, self.timeline.schedule)

  def report(self) -> str:
    """Makespan, bubble, what is proven, the stages and the devices, as text."""
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
