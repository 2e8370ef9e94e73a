"""Costs of actions: how long each takes, and how it changes the memory that its device holds.

Both may differ by stage. They are inputs of planning and simulation only: a legal schedule is legal
at any costs.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from jaxpipe.schedules.actions import Step
from jaxpipe.schedules.kinds import PRODUCTS, REQUIRED, Kind
from jaxpipe.schedules.schedule import Schedule

_LEAST, _MOST = 1e-12, 1e15
# The passes that durations and memory are given for; those of B follow.
_GIVEN = (*REQUIRED, Kind.R)

# One number for all stages, or one per stage.
PerStage = float | Sequence[float]
# Changes in the memory that a device holds by F, I and W, and by R if there is a fourth.
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
    """Returns the times of F, R, I, W and B on each of S stages, without the head."""
    recompute = self.forward if self.recompute is None else self.recompute
    given = (
      ("forward", self.forward),
      ("input_grad", self.input_grad),
      ("weight_grad", self.weight_grad),
      ("recompute", recompute),
    )
    return _of_passes(by_stage(name, value, stages) for name, value in given)

  def all_durations(self, schedule: Schedule) -> dict[Kind, tuple[float, ...]]:
    """Returns the time of every action, by its kind and by the number before the letter."""
    S, P = schedule.stages, schedule.devices
    times = self.durations(S)
    if self.head and not schedule.vocabulary:
      for kind in times:
        # Once for each of F, I and W, so twice for a fused B; R repeats the layers only.
        if kind.info.necessary:
          head = len(PRODUCTS[kind]) * self.head
          times[kind] = (*times[kind][:-1], times[kind][-1] + head)
    shares = {0: (0, 0), 1: (2, 1), 2: (1, 2)}[schedule.vocabulary]
    for kind, share in zip((Kind.S, Kind.T), shares, strict=True):
      times[kind] = (_part(share * self.head, P),) * P
    times[Kind.G] = by_stage("gather", self.gather, S)
    times[Kind.X] = (0,) * S
    times[Kind.U] = by_stage("update", self.update, S)
    times[Kind.Y] = self._fillers(schedule)
    return times

  def _fillers(self, schedule: Schedule) -> tuple[float, ...]:
    """Returns one time per frozen layer, for as many as the schedule has."""
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
    """Returns the time of one step of a device's list, be it an action or an overlapped pair.

    Args:
      step: the step.
      durations: `all_durations` of its schedule.
    """
    times = [durations[part.kind][part.stage] for part in step.parts]
    return times[0] if len(times) == 1 else self.overlap * sum(times)


def _part(total: float, parts: int) -> float:
  """Divides, with an integer result where integers divide evenly."""
  return total // parts if total % parts == 0 else total / parts


def memory_changes(memory: Memory, stages: int) -> dict[Kind, tuple[float, ...]]:
  """Returns the changes of the memory that a device holds, by kind of action and stage.

  Args:
    memory: changes by F, I and W, and by R (0 if not given); numbers or sequences by stage.
    stages: number of stages, S.

  Returns:
    S numbers each for F, R, I, W and B; other kinds change nothing.

  Raises:
    ValueError: there are not three or four changes, or a sequence has not one entry per stage.
  """
  if len(memory) not in (3, 4):
    raise ValueError(f"memory has {len(memory)} changes, not 3 (F, I, W) or 4 (F, I, W, R)")
  # R changes nothing unless a fourth change is given.
  changes = memory if len(memory) == 4 else (*memory, 0)
  return _of_passes(
    by_stage(f"memory of {kind.value}", change, stages)
    for kind, change in zip(_GIVEN, changes, strict=True)
  )


def _of_passes(given: Iterable[tuple[float, ...]]) -> dict[Kind, tuple[float, ...]]:
  """Numbers by stage of F, R, I, W and B, from those of F, I, W and R in this order.

  A fused B counts as I + W at once: what it holds in between is its own affair.
  """
  numbers = dict(zip(_GIVEN, given, strict=True))
  return {
    kind: tuple(map(sum, zip(*map(numbers.__getitem__, made), strict=True)))
    for kind, made in PRODUCTS.items()
    if numbers.keys() >= set(made)
  }


def by_stage(name: str, value: PerStage, stages: int) -> tuple[float, ...]:
  """Returns one number for each of S stages.

  Args:
    name: name of the value in an error message.
    value: one number for all stages, or a sequence with one for each.
    stages: number of stages, S.

  Raises:
    ValueError: a sequence has not one entry per stage.
  """
  if not isinstance(value, Sequence):
    return (value,) * stages
  if len(value) != stages:
    raise ValueError(
      f"{name} lists {len(value)} stages, the schedule has {stages}; give one number, or {stages}"
    )
  return tuple(value)
