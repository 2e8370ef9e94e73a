"""What work costs: how long each action takes, and what it changes in what a device holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpipe.schedules.actions import Kind, Step

if TYPE_CHECKING:
  from jaxpipe.schedules.schedule import Schedule

_LEAST, _MOST = 1e-12, 1e15

# One number for all stages, or one per stage.
PerStage = float | Sequence[float]
# Changes in what a device holds by F, I and W, and by R if there is a fourth.
Memory = tuple[PerStage, ...]


@dataclasses.dataclass(frozen=True)
class Costs:
  """Durations, in any one unit of time: integers in give integers, exactly, out.

  Attributes:
    forward: time of F on one stage; a number, or a sequence by stage.
    input_grad: time of I.
    weight_grad: time of W. A fused B takes I + W.
    hop: latency of sending between two devices.
    recompute: time of R; by default that of F.
    head: time of the output layer's forward; its input gradient and its weight gradient take as
      long each. On the last stage, S-1, it adds to F, I and W (paths that end elsewhere pay
      none); sharded over P devices, S and T share three P-ths of it: S two and T one with one
      barrier, S one and T two with two.
    gather: time of G on one stage; releasing takes none.
    filler: time of Y for one microbatch; a number, or a sequence by frozen layer.
    update: time of U.
    overlap: what an overlapped pair takes, as a share of its two parts' time.
    hop_occupies_link: whether a link between two devices carries one transfer at a time, each for
      `hop`; by default transfers do not disturb each other.
  """

  forward: PerStage = 1
  input_grad: PerStage = 1
  weight_grad: PerStage = 1
  hop: float = 0
  _: dataclasses.KW_ONLY
  recompute: PerStage | None = None
  head: float = 0
  gather: PerStage = 0
  filler: PerStage = 1
  update: PerStage = 0
  overlap: float = 1
  hop_occupies_link: bool = False

  # Lengths of sequences wait until a schedule says how many stages there are.
  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      for cost in value if isinstance(value, Sequence) else (value,):
        # Written so that a NaN is refused as well.
        if cost is None:
          continue
        if not 0 <= cost < float("inf"):
          raise ValueError(f"{field.name}={cost} is no duration; use 0 or more")
        # Sums of them must stay numbers, and pictures of them drawable.
        if cost and not _LEAST < cost < _MOST:
          raise ValueError(f"{field.name} is not between {_LEAST:g} and {_MOST:g}; use other units")

  def durations(self, stages: int) -> dict[Kind, tuple[float, ...]]:
    """Time of F, R, I, W and B on each of S stages, without the head."""
    forward = by_stage("forward", self.forward, stages)
    input_grad = by_stage("input_grad", self.input_grad, stages)
    weight_grad = by_stage("weight_grad", self.weight_grad, stages)
    recompute = self.forward if self.recompute is None else self.recompute
    return {
      Kind.F: forward,
      Kind.R: by_stage("recompute", recompute, stages),
      Kind.I: input_grad,
      Kind.W: weight_grad,
      Kind.B: tuple(i + w for i, w in zip(input_grad, weight_grad, strict=True)),
    }

  def all_durations(self, schedule: Schedule) -> dict[Kind, tuple[float, ...]]:
    """Time of every action, by its kind and the number before the kind."""
    S, P = schedule.stages, schedule.devices
    times = self.durations(S)
    if self.head and not schedule.vocabulary:
      for kind, parts in ((Kind.F, 1), (Kind.I, 1), (Kind.W, 1), (Kind.B, 2)):
        times[kind] = (*times[kind][:-1], times[kind][-1] + parts * self.head)
    shares = {0: (0, 0), 1: (2, 1), 2: (1, 2)}[schedule.vocabulary]
    for kind, share in zip((Kind.S, Kind.T), shares, strict=True):
      times[kind] = (_part(share * self.head, P),) * P
    times[Kind.G] = by_stage("gather", self.gather, S)
    times[Kind.X] = (0,) * S
    times[Kind.U] = by_stage("update", self.update, S)
    times[Kind.Y] = self._fillers(schedule)
    return times

  def _fillers(self, schedule: Schedule) -> tuple[float, ...]:
    """One time per frozen layer, as many as the schedule has."""
    layers = max(
      (
        1 + action.stage
        for row in schedule.order
        for step in row
        for action in step.parts
        if action.kind is Kind.Y
      ),
      default=0,
    )
    if layers and isinstance(self.filler, Sequence):
      return by_stage("filler", self.filler, layers)
    return (self.filler,) * layers if not isinstance(self.filler, Sequence) else ()

  def of(self, step: Step, durations: dict[Kind, tuple[float, ...]]) -> float:
    """Time of one step of a device's list, pairs included."""
    times = [durations[part.kind][part.stage] for part in step.parts]
    return times[0] if len(times) == 1 else self.overlap * sum(times)


def _part(total: float, parts: int) -> float:
  """A share that stays an integer where it can."""
  return total // parts if total % parts == 0 else total / parts


def memory_changes(memory: Memory, stages: int) -> dict[Kind, tuple[float, ...]]:
  """What every kind of action changes in what its device holds, by stage.

  Args:
    memory: changes by F, I and W, and by R (0 if not given); numbers or sequences by stage.
    stages: number of stages, S.

  Raises:
    ValueError: there are not three or four changes, or a sequence has not one entry per stage.
  """
  if len(memory) not in (3, 4):
    raise ValueError(f"memory has {len(memory)} changes, not 3 (F, I, W) or 4 (F, I, W, R)")
  names = ("F", "I", "W", "R")[: len(memory)]
  parts = {
    name: by_stage(f"memory of {name}", value, stages)
    for name, value in zip(names, memory, strict=True)
  }
  return {
    Kind.F: parts["F"],
    Kind.R: parts.get("R", (0,) * stages),
    Kind.I: parts["I"],
    Kind.W: parts["W"],
    # At once: what a fused backward holds in between is its own affair.
    Kind.B: tuple(i + w for i, w in zip(parts["I"], parts["W"], strict=True)),
  }


def by_stage(name: str, value: PerStage, stages: int) -> tuple[float, ...]:
  """One number for each of S stages; `name` is what an error calls it."""
  if not isinstance(value, Sequence):
    return (value,) * stages
  if len(value) != stages:
    raise ValueError(
      f"{name} lists {len(value)} stages, the schedule has {stages}; give one number, or {stages}"
    )
  return tuple(value)
