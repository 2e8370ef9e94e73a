"""A scheduling problem in integers, and schedules as words: what the search works on.

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

from jaxpipe.schedules.actions import Action, Kind
from jaxpipe.schedules.costs import Costs, Memory, memory_changes
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate
from jaxpipe.schedules.spec import limit_by_device

KINDS = (Kind.F, Kind.I, Kind.W)
Objective = Literal["makespan", "span"]
Letter = int  # KINDS.index(kind) * stages + stage
Words = list[list[Letter]]  # one word per device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What a search found.

  Attributes:
    schedule: the best schedule, legal and within the limits.
    value: its makespan or span.
    lower_bound: what no schedule of the same placement can go below, proven.
    optimal: whether the two meet.
  """

  schedule: Schedule
  value: float
  lower_bound: float
  optimal: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """Costs, memory and limits in whole numbers; tuples of F, I and W list them by letter.

  Attributes:
    placement: where the stages live.
    microbatches: number of microbatches, M.
    times: duration of every letter.
    hop: latency between two devices.
    changes: what every letter changes in what its device holds.
    limits: most that each device may hold, or None.
    objective: `makespan` or `span`.
    scale: how many of our units of time make one of the caller's.
    memory_scale: the same for memory.
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
    """The letter on another stage that each waits for; its own stage's, its word keeps."""
    S = self.placement.stages
    return (None, *range(S - 1), *range(S + 1, 2 * S), None, *(None for _ in range(S)))

  @functools.cached_property
  def lags(self) -> tuple[int, ...]:
    """How long that input travels."""
    home = [self.placement.device(t % self.placement.stages) for t in range(len(self.times))]
    return tuple(
      self.hop if p is not None and home[p] != home[t] else 0 for t, p in enumerate(self.inputs)
    )

  @functools.cached_property
  def fusable(self) -> bool:
    """Whether a fused B can fit where its halves do not: I alone would hold more."""
    S = self.placement.stages
    return self.limits is not None and max(self.changes[S : 2 * S]) > 0

  def costs(self) -> Costs:
    """The durations as the simulator takes them."""
    S = self.placement.stages
    return Costs(self.times[:S], self.times[S : 2 * S], self.times[2 * S :], self.hop)

  def peaks(self, schedule: Schedule) -> tuple[int, ...]:
    """Most that each device holds."""
    S = self.placement.stages
    memory = (self.changes[:S], self.changes[S : 2 * S], self.changes[2 * S :])
    return tuple(int(peak) for peak in peaks(schedule, memory).memory)

  def value(self, schedule: Schedule) -> int | None:
    """The objective of a schedule, or None where it does not fit the limits."""
    limits = self.limits
    if limits and any(a > b for a, b in zip(self.peaks(schedule), limits, strict=True)):
      return None
    timeline = simulate(schedule, self.costs())
    return int(timeline.makespan if self.objective == "makespan" else timeline.span)

  def words(self, schedule: Schedule) -> Words:
    """Forgets microbatches and cuts every B in two."""
    S = self.placement.stages
    halves = {Kind.F: (0,), Kind.I: (1,), Kind.W: (2,), Kind.B: (1, 2)}
    return [
      [k * S + a.stage for step in row for a in step.parts for k in halves[a.kind]]
      for row in schedule.order
    ]

  def schedule(self, words: Words, name: str = "search") -> Schedule:
    """Counts microbatches off."""
    S = self.placement.stages
    order = []
    for word in words:
      count = [0] * len(self.times)
      row = []
      for t in word:
        row.append(Action(t % S, KINDS[t // S], count[t]))
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
  """Scales a problem to integers. Floats are taken as the decimals they are written as.

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
  # Of a schedule without actions: what they take depends on the sizes alone.
  durations = costs.all_durations(Schedule("search", placement, microbatches, ((),) * P))
  changes = memory_changes(memory, S)
  limits = limit_by_device(memory_limit, P)
  finite = [x for x in limits if x != math.inf]
  times, scale = _integers([*(x for kind in KINDS for x in durations[kind]), costs.hop])
  units, memory_scale = _integers([*(x for kind in KINDS for x in changes[kind]), *finite])
  # No limit is one that nobody reaches.
  most = microbatches * sum(max(change, 0) for change in units[: 3 * S])
  given = iter(units[3 * S :])
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
  exact = [fractions.Fraction(str(x)) for x in values]
  scale = math.lcm(*(x.denominator for x in exact))
  return [int(x * scale) for x in exact], scale
