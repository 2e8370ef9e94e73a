"""When each action runs, what that leaves idle, and how much each device holds meanwhile.

Devices run their lists in order; an action starts when its device is free and what it needs has
arrived. A hop between devices is latency and occupies nobody.

Two bubbles are reported because two are paid. Over the *makespan*: the idle share of all devices
between the first start and the last end, which a jitted step with its barrier pays. Over the
*span*: the same for the longest single device alone, which the Zero Bubble papers print
(Qi et al., 2023, arXiv:2401.10241), where the next step may start before this one has ended.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from jaxpipe.schedules.actions import Action, Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.walk import walk

# One number for all stages, or one per stage.
PerStage = float | Sequence[float]
Memory = tuple[PerStage, PerStage, PerStage]


@dataclasses.dataclass(frozen=True)
class Costs:
  """Durations, in any one unit of time: integers in give integers, exactly, out.

  Attributes:
    forward: time of F on one stage; a number, or a sequence by stage.
    input_grad: time of I.
    weight_grad: time of W. A fused B takes I + W; a recompute takes as long as its forward.
    hop: latency of sending between two devices.
  """

  forward: PerStage = 1
  input_grad: PerStage = 1
  weight_grad: PerStage = 1
  hop: float = 0

  # Lengths of sequences wait until a schedule says how many stages there are.
  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      for cost in value if isinstance(value, Sequence) else (value,):
        # Written so that a NaN is refused as well.
        if not 0 <= cost < float("inf"):
          raise ValueError(f"{field.name}={cost} is no duration; use 0 or more")

  def durations(self, stages: int) -> dict[Kind, tuple[float, ...]]:
    """Time of every kind of action on each of S stages."""
    forward = _by_stage("forward", self.forward, stages)
    input_grad = _by_stage("input_grad", self.input_grad, stages)
    weight_grad = _by_stage("weight_grad", self.weight_grad, stages)
    fused = tuple(i + w for i, w in zip(input_grad, weight_grad, strict=True))
    return {
      Kind.F: forward,
      Kind.R: forward,
      Kind.I: input_grad,
      Kind.W: weight_grad,
      Kind.B: fused,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
  """A schedule in time.

  Attributes:
    schedule: what ran.
    start: `start[d][i]` is when device d starts the i-th action of its list.
    end: when it ends it.
    busy: time that each device works.
    peak_activations: most chunks that each device holds at once, from F until W or B.
    peak_pending_weight_grads: most of them at once whose I is done and whose W is not.
    peak_memory: most memory that each device holds at once, in the unit of `memory`.
  """

  schedule: Schedule
  start: tuple[tuple[float, ...], ...]
  end: tuple[tuple[float, ...], ...]
  busy: tuple[float, ...]
  peak_activations: tuple[int, ...]
  peak_pending_weight_grads: tuple[int, ...]
  peak_memory: tuple[float, ...]

  # Derived, not stored: a timeline cannot contradict itself.
  @property
  def makespan(self) -> float:
    """Time from the start of the step to the end of the last action of all devices."""
    return max(row[-1] for row in self.end if row)

  @property
  def span(self) -> float:
    """Longest time of a single device from its first start to its last end."""
    return max(e[-1] - s[0] for s, e in zip(self.start, self.end, strict=True) if s)

  @property
  def bubble(self) -> float:
    """Idle share of all devices over the makespan: 1 - sum(busy) / (P * makespan)."""
    # One division, at the end: with integers, everything before it is exact.
    total = len(self.busy) * self.makespan
    return (total - sum(self.busy)) / total if total else 0.0

  @property
  def span_bubble(self) -> float:
    """Idle share over the span: (span - max(busy)) / span."""
    return (self.span - max(self.busy)) / self.span if self.span else 0.0


def simulate(
  schedule: Schedule, costs: Costs | None = None, memory: Memory = (1, 0, -1)
) -> Timeline:
  """Runs a schedule on paper.

  Args:
    schedule: a legal schedule, or the forward-only part of one.
    costs: durations; by default every F, I and W takes 1 and a hop nothing.
    memory: what an F, an I and a W change in what its device holds, each a number or a sequence by
      stage. A fused B changes it by I + W at once, a recompute not at all.

  Returns:
    The timeline, in the units of `costs` and `memory`.

  Raises:
    ScheduleError: the schedule dead-locks.
    ValueError: a list of costs or memory has not one entry per stage.
  """
  costs = costs or Costs()
  P, S, M = schedule.devices, schedule.stages, schedule.microbatches
  durations = costs.durations(S)
  starts: list[list[float]] = [[] for _ in range(P)]
  ends: list[list[float]] = [[] for _ in range(P)]
  free: list[float] = [0] * P
  # When and where every awaited product appeared, by its slot. Where is noted rather than asked
  # of the placement: a placement with replicas has no single answer.
  when: list[float] = [0] * (2 * S * M)
  where = [0] * (2 * S * M)
  for d, action, inputs, output in walk(schedule.order, S, M):
    start = free[d]
    for i in inputs:
      # Chunks on one device hand over in place.
      arrival = when[i] if where[i] == d else when[i] + costs.hop
      if arrival > start:
        start = arrival
    free[d] = start + durations[action.kind][action.stage]
    starts[d].append(start)
    ends[d].append(free[d])
    if output is not None:
      when[output], where[output] = free[d], d
  changes = _changes(memory, S)
  held = [_peaks(row, changes) for row in schedule.order]
  return Timeline(
    schedule=schedule,
    start=tuple(map(tuple, starts)),
    end=tuple(map(tuple, ends)),
    busy=tuple(sum(durations[a.kind][a.stage] for a in row) for row in schedule.order),
    peak_activations=tuple(peak[0] for peak in held),
    peak_pending_weight_grads=tuple(peak[1] for peak in held),
    peak_memory=tuple(peak[2] for peak in held),
  )


# Counted in chunks whatever `memory` says: a chunk is held until its weight gradient is done, for
# W needs the layer inputs that F kept.
_ACTIVATIONS = {Kind.F: 1, Kind.R: 0, Kind.I: 0, Kind.W: -1, Kind.B: -1}
# A fused B never leaves a weight gradient pending.
_PENDING = {Kind.F: 0, Kind.R: 0, Kind.I: 1, Kind.W: -1, Kind.B: 0}


def _peaks(row: Sequence[Action], changes: dict[Kind, tuple[float, ...]]) -> tuple[int, int, float]:
  """Most activations, pending weight gradients and memory that one device holds at once."""
  # A device does one thing at a time, so its own list decides; times play no part. Starting from
  # nothing held keeps a peak from being negative.
  return (
    max(itertools.accumulate((_ACTIVATIONS[a.kind] for a in row), initial=0)),
    max(itertools.accumulate((_PENDING[a.kind] for a in row), initial=0)),
    max(itertools.accumulate((changes[a.kind][a.stage] for a in row), initial=0)),
  )


def _changes(memory: Memory, stages: int) -> dict[Kind, tuple[float, ...]]:
  forward, input_grad, weight_grad = (
    _by_stage(f"memory of {kind}", value, stages) for kind, value in zip("FIW", memory, strict=True)
  )
  # What a recompute holds depends on the residual policy, which `memory` has no word for.
  return {
    Kind.F: forward,
    Kind.R: (0,) * stages,
    Kind.I: input_grad,
    Kind.W: weight_grad,
    Kind.B: tuple(i + w for i, w in zip(input_grad, weight_grad, strict=True)),
  }


def _by_stage(name: str, value: PerStage, stages: int) -> tuple[float, ...]:
  if not isinstance(value, Sequence):
    return (value,) * stages
  if len(value) != stages:
    raise ValueError(
      f"{name} lists {len(value)} stages, the schedule has {stages}; give one number, or {stages}"
    )
  return tuple(value)
