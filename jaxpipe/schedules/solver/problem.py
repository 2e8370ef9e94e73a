"""A scheduling problem in whole numbers, and schedules as words: the data of all searches.

A pipeline step has no microbatches worth telling apart: every F of a stage takes as long as every
other, holds as much and waits for the same stages. So the k-th F, I and W that a stage runs may
be called microbatch k's. Proof: when a stage starts its k-th action of a kind, k of them have
started, so k of the actions that they wait for had ended in time, so the k-th of those had.

What is left of a device's list is a *word* over (kind, stage), and nothing is lost:

  device 0: 0F0 0F1 0F2 0I1 0I0 0W1  ->  0F 0F 0F 0I 0I 0W  ->  0F0 0F1 0F2 0I0 0I1 0W0

A fused B is its I and W side by side. Its halves are never worse unless I gives memory up to W:
see `Problem.fusable`.
"""

import dataclasses
import fractions
import functools
import math
from collections.abc import Sequence
from typing import Literal

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.costs import Costs, Memory, memory_changes
from jaxpipe.schedules.kinds import PRODUCTS, REQUIRED, Kind
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate
from jaxpipe.schedules.spec import ROUNDING, limit_by_device

Objective = Literal["makespan", "span"]
Letter = int  # REQUIRED.index(kind) * stages + stage
Words = list[list[Letter]]  # one word per device

# For F, I, W and B, the positions in `REQUIRED` of what they make.
_KINDS_OF = {
  kind: tuple(map(REQUIRED.index, PRODUCTS[kind])) for kind in Kind if kind.info.necessary
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """The result of a search.

  Attributes:
    schedule: the best schedule found, legal and within the limits.
    value: its makespan or span.
    lower_bound: a number that is proven to be no larger than the objective of any schedule of the
      same placement.
    optimal: whether the value equals the bound.
  """

  schedule: Schedule
  value: float
  lower_bound: float
  optimal: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """Costs, memory and limits in whole numbers.

  A letter is F, I or W of one stage, as a number: F of stage s is s, I is S + s, W is 2S + s.

  Attributes:
    placement: where the stages live; each on one device.
    microbatches: number of microbatches, M.
    times: durations of the 3S letters.
    hop: latency between two devices.
    changes: changes of the memory that a device holds by the 3S letters.
    limits: P limits, the most memory that each device may hold; None where none has one.
    objective: `makespan` or `span`.
    scale: number of the problem's units of time in one of the caller's.
    memory_scale: number of the problem's units of memory in one of the caller's.
  """

  placement: Placement
  microbatches: int
  times: tuple[int, ...]
  hop: int
  changes: tuple[int, ...]
  limits: tuple[int, ...] | None
  objective: Objective
  scale: int
  memory_scale: int

  @functools.cached_property
  def inputs(self) -> tuple[Letter | None, ...]:
    """For each letter, the letter of another stage that it waits for; None where there is none.

    Waits within a stage, I for F and W for I, are not listed: words keep F before I before W.
    """
    S = self.placement.stages
    return (None, *range(S - 1), *range(S + 1, 2 * S), None, *(None for _ in range(S)))

  @functools.cached_property
  def lags(self) -> tuple[int, ...]:
    """For each letter, the latency of that input: a hop where it comes from another device."""
    home = [self.placement.device(t % self.placement.stages) for t in range(len(self.times))]
    return tuple(
      self.hop if p is not None and home[p] != home[t] else 0 for t, p in enumerate(self.inputs)
    )

  @functools.cached_property
  def fusable(self) -> bool:
    """Whether a fused B can fit the limits where its I and W do not: a lone I would hold more."""
    S = self.placement.stages
    return self.limits is not None and max(self.changes[S : 2 * S]) > 0

  def costs(self) -> Costs:
    """Returns the durations as the simulator takes them."""
    S = self.placement.stages
    return Costs(self.times[:S], self.times[S : 2 * S], self.times[2 * S :], self.hop)

  def peaks(self, schedule: Schedule) -> tuple[int, ...]:
    """Returns the most memory that each device holds, in the problem's units."""
    S = self.placement.stages
    memory = (self.changes[:S], self.changes[S : 2 * S], self.changes[2 * S :])
    return tuple(int(peak) for peak in peaks(schedule, memory).memory)

  def value(self, schedule: Schedule) -> int | None:
    """Returns the objective of a schedule, or None where it does not fit the limits."""
    limits = self.limits
    if limits and any(a > b for a, b in zip(self.peaks(schedule), limits, strict=True)):
      return None
    timeline = simulate(schedule, self.costs())
    return int(timeline.makespan if self.objective == "makespan" else timeline.span)

  def words(self, schedule: Schedule) -> Words:
    """Returns the words of a schedule of F, I, W and B: without microbatches, each B as I and W."""
    S = self.placement.stages
    return [
      [k * S + a.stage for step in row for a in step.parts for k in _KINDS_OF[a.kind]]
      for row in schedule.order
    ]

  def schedule(self, words: Words, name: str = "search") -> Schedule:
    """Returns words as a schedule: the k-th letter of a kind and stage is microbatch k's."""
    S = self.placement.stages
    order = []
    for word in words:
      count = [0] * len(self.times)
      row = []
      for t in word:
        row.append(Action(t % S, REQUIRED[t // S], count[t]))
        count[t] += 1
      order.append(tuple(row))
    return Schedule(name, self.placement, self.microbatches, tuple(order))


def pose(
  *,
  placement: Placement,
  microbatches: int,
  costs: Costs,
  memory: Memory,
  memory_limit: float | Sequence[float] | None,
  objective: Objective,
) -> Problem:
  """Scales a problem to whole numbers; floats are taken as the decimals they are written as.

  Args:
    placement: where the stages live.
    microbatches: number of microbatches, M.
    costs: durations, each one number or one per stage.
    memory: changes of the memory that a device holds by F, I and W.
    memory_limit: most memory that a device may hold: one number, or one per device; passed by
      `ROUNDING` of it at most.
    objective: `makespan` or `span`.

  Returns:
    The problem, in units so small that all its numbers are whole.

  Raises:
    ValueError: a list has the wrong length, or something is asked for that is not planned with.
  """
  P, S = placement.devices, placement.stages
  if objective not in ("makespan", "span"):
    raise ValueError(f'unknown objective {objective!r}; use "makespan" or "span"')
  if placement.replicated:
    raise ValueError(f"{placement.name} holds stages twice; search on loop, v or wave")
  if costs.hop_occupies_link:
    raise ValueError("search plans with transfers side by side; use hop_occupies_link=False")
  # A schedule without actions is enough: durations depend on the sizes alone.
  durations = costs.all_durations(Schedule("search", placement, microbatches, ((),) * P))
  changes = memory_changes(memory, S)
  limits = limit_by_device(memory_limit, P)
  finite = [x for x in limits if x != math.inf]
  times, scale = _integers([*(x for kind in REQUIRED for x in durations[kind]), costs.hop])
  units, memory_scale = _integers([*(x for kind in REQUIRED for x in changes[kind]), *finite])
  # Beside finite limits, an infinite one becomes a limit that no schedule reaches.
  most = microbatches * sum(max(change, 0) for change in units[: 3 * S])
  # As all else is whole, so is the room for rounding: none where the units are not that fine.
  given = iter(x + int(x * ROUNDING) for x in units[3 * S :])
  return Problem(
    placement=placement,
    microbatches=microbatches,
    times=tuple(times[:-1]),
    hop=times[-1],
    changes=tuple(units[: 3 * S]),
    limits=tuple(most if x == math.inf else next(given) for x in limits) if finite else None,
    objective=objective,
    scale=scale,
    memory_scale=memory_scale,
  )


def _integers(values: Sequence[float]) -> tuple[list[int], int]:
  """Returns whole numbers in the ratios of the values, and the factor between the two."""
  exact = [fractions.Fraction(str(x)) for x in values]
  scale = math.lcm(*(x.denominator for x in exact))
  return [int(x * scale) for x in exact], scale
