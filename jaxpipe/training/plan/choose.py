"""Which schedule to run: the fastest that the devices hold, or the leanest of those as fast.

Zero bubble is not free: what W waits for may be several times what F keeps. So a schedule is
weighed by both, before anything is compiled:

    [1] time    of every registered schedule's tick table, at the FLOPs of the stack's F, I and W
    [2] memory  of one device, by `memory_report`; what does not fit is left out
    [3] choice  of those within 3 % of the fastest that is left, the one that holds least
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import STAGE, row_shards
from jaxpipe.pipeline.costs.flops import counted_costs
from jaxpipe.pipeline.costs.memory import memory_report
from jaxpipe.pipeline.device.order import blocks
from jaxpipe.pipeline.executor import lower_on
from jaxpipe.pipeline.layer.residuals import Policy, residual_policy
from jaxpipe.pipeline.table.unroll import cut, estimated_time
from jaxpipe.schedules import Costs, Schedule, make_schedule
from jaxpipe.schedules.command.compare import compare, scale_costs

Tree = Any

# Estimates are no better than this: what is so near the fastest counts as fast.
_EQUALLY_FAST = 1.03


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One schedule.

  Attributes:
    label: its name, and how its backward is cut where that is not the family's own way.
    schedule: itself.
    time: of a step; the unit is a forward of a P-th part of the layers.
    bytes: what one device holds; 0 until it is asked.
  """

  label: str
  schedule: Schedule
  time: float
  bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Choice:
  """What was chosen, and among what.

  Attributes:
    best: the chosen one.
    candidates: those that were weighed, fastest first; all others are slower.
    limit: bytes that one device may hold; None without a limit.
  """

  best: Candidate
  candidates: tuple[Candidate, ...]
  limit: float | None

  @property
  def schedule(self) -> Schedule:
    """The chosen schedule."""
    return self.best.schedule

  def __str__(self) -> str:
    wide = max(len(c.label) for c in self.candidates)
    return "\n".join(
      f"{c.label:{wide}}  time {c.time / self.best.time:.3f}  {c.bytes / 2**20:,.1f} MiB"
      + (", chosen" if c is self.best else "" if _fits(c, self.limit) else ", too large")
      for c in self.candidates
    )


def choose_schedule(
  stack: Any,
  mesh: Mesh,
  example_batch: Tree,
  *,
  microbatches: int,
  residuals: str | Policy = "dots",
  unroll: str = "auto",
  slack: int = 0,
  optimizer: Any = None,
  memory_limit: float | None = None,
) -> Choice:
  """Chooses among the registered schedules that compute the whole model, with the head whole.

  Args:
    stack, mesh, residuals, unroll, slack: as for `pipeline_value_and_grad`.
    example_batch: a batch or its shapes, leaves `[B, ...]`.
    microbatches: M.
    optimizer: an optax transformation, whose state counts.
    memory_limit: bytes that one device may hold.

  Raises:
    ValueError: no schedule fits the layers or the limit; says what 1F1B needs. Or the layers are
      not alike.
  """
  if not stack.uniform:
    raise ValueError(
      "schedules are chosen for layers of one kind, and the stack's are not alike; name one, for"
      " example 1f1b or zb-h1"
    )
  sizes: dict[str, Any] = dict(devices=mesh.shape[STAGE], microbatches=microbatches)
  policy: dict[str, Any] = dict(residuals=residuals, slack=slack, optimizer=optimizer)

  def report(schedule: Schedule) -> Any:
    return memory_report(stack, schedule, mesh, example_batch, **policy)

  # Families that plan within a limit want it in what F keeps of a P-th part of the layers.
  one, room = report(make_schedule("1f1b", **sizes)), None
  costs = _costs(stack, mesh, example_batch, microbatches, residuals)
  if memory_limit is not None:
    room = max(memory_limit - one.total + one.rings, 0) / one.unit
  entries = compare(**sizes, costs=costs, memory=one.units, memory_limit=room)

  def timed() -> Iterator[Candidate]:
    policy = residual_policy(residuals)
    for entry in entries:
      schedule = entry.timeline and entry.timeline.schedule
      # Who leaves layers out trains another model.
      if schedule and not schedule.paths and stack.depth % schedule.stages == 0:
        program = lower_on(schedule, mesh, policy, slack)
        times = scale_costs(costs, schedule.devices, schedule.stages)
        time = estimated_time(program, cut(program, unroll), times, blocking=blocks(mesh))
        yield Candidate(entry.label, schedule, time)

  candidates = sorted(timed(), key=lambda candidate: candidate.time)
  choice = _choose(candidates, lambda schedule: report(schedule).total, memory_limit)
  if choice is None:
    raise ValueError(
      f"no schedule fits a memory_limit of {memory_limit:,.0f} bytes a device; 1f1b needs"
      f" {one.total:,}, of which {one.rings:,} are the schedule's: use a thriftier residual policy,"
      " smaller microbatches or more stages"
    )
  return choice


def _costs(stack: Any, mesh: Mesh, batch: Tree, microbatches: int, residuals: Any) -> Costs:
  each = microbatches * row_shards(mesh)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // each, *leaf.shape[1:]), leaf.dtype), batch
  )
  return counted_costs(stack, shapes, mesh.shape[STAGE], residuals)


def _choose(
  candidates: list[Candidate], held: Callable[[Schedule], int], limit: float | None
) -> Choice | None:
  """Weighs them, fastest first, until all that are as fast as the first that fits are seen."""
  seen: list[Candidate] = []
  fitting: list[Candidate] = []
  for candidate in candidates:
    if fitting and candidate.time > _EQUALLY_FAST * fitting[0].time:
      break
    seen.append(dataclasses.replace(candidate, bytes=held(candidate.schedule)))
    if _fits(seen[-1], limit):
      fitting.append(seen[-1])
  if not fitting:
    return None
  return Choice(min(fitting, key=lambda c: c.bytes), tuple(seen), limit)


def _fits(candidate: Candidate, limit: float | None) -> bool:
  return limit is None or candidate.bytes <= limit
