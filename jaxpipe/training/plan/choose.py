"""Chooses a schedule: the fastest that fits into the devices, or the leanest of those as fast.

The fastest schedule may need the most memory: in zero bubble, what is kept for a delayed W may be
several times what F keeps. So time and memory are both estimated, before anything is compiled:

    [1] time    of every registered schedule's tick table, with early ticks and by kind, at the
                FLOPs of the stack's F, I and W
    [2] memory  of one device, by `memory_report`; what does not fit is left out
    [3] choice  of those within 3 % of the fastest that is left, the one that holds least
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import row_shards, stages_of
from jaxpipe.pipeline.costs.layer_costs import counted_costs
from jaxpipe.pipeline.costs.memory import memory_report
from jaxpipe.pipeline.device.order import blocks
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.layer.residuals import Policy
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.pipeline.table.tick_times import estimated_time
from jaxpipe.schedules import Costs, Schedule, make_schedule
from jaxpipe.schedules.build import TICKS
from jaxpipe.schedules.command.compare import compare, scale_costs
from jaxpipe.stack.context import map_entries
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.stack import LayerStack

Tree = Any

# Estimates are no more exact than this: a time within 3 % of the fastest counts as fast.
_EQUALLY_FAST = 1.03


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A schedule that may be chosen.

  Attributes:
    label: its name, its kind of backward and V where they are not the family's own, and `by kind`
      where its ticks are.
    schedule: the schedule, for the mesh's stages.
    time: estimated time of a step; the unit is a forward of a P-th part of the layers.
    bytes: memory that one device needs; 0 until it is estimated.
  """

  label: str
  schedule: Schedule
  time: float
  bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Choice:
  """The chosen schedule, and those that it was compared with; as text, a line for each.

  Attributes:
    best: the chosen candidate.
    candidates: those whose memory was estimated, fastest first; all others are slower.
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
  stack: LayerStack,
  mesh: Mesh,
  example_batch: Tree,
  *,
  microbatches: int,
  residuals: str | Policy = "dots",
  unroll: str = "auto",
  slack: int = 0,
  optimizer: Any = None,
  averages: bool = False,
  memory_limit: float | None = None,
) -> Choice:
  """Chooses among the registered schedules that compute the whole model, with the head whole.

  Args:
    stack, mesh, residuals, unroll, slack: as for `pipeline_value_and_grad`.
    example_batch: a batch or its shapes, leaves `[B, ...]`.
    microbatches: M.
    optimizer: an optax transformation, whose state counts as memory, or a function that makes one
      for a schedule; None: nothing is counted.
    averages: whether a moving average of the parameters counts as memory, too.
    memory_limit: bytes that one device may hold; None: any number.

  Returns:
    The choice, whose `schedule` is for the mesh's stages.

  Raises:
    ValueError: no schedule fits the layers or the limit; says what 1F1B needs. Or the layers are
      not alike.
  """
  stages = stages_of(mesh)
  if not mode_of(stack).looped:
    raise ValueError(
      "schedules are chosen for layers of one kind, and the stack's are not alike; name one, for"
      " example 1f1b or zb-h1"
    )
  sizes: dict[str, Any] = dict(devices=stages, microbatches=microbatches)
  policy: dict[str, Any] = dict(residuals=residuals, slack=slack, averages=averages)

  def report(schedule: Schedule) -> Any:
    tx = optimizer(schedule) if callable(optimizer) else optimizer
    return memory_report(stack, schedule, mesh, example_batch, optimizer=tx, **policy)

  # Families that plan within a limit want it in units of what F keeps of a P-th part of the layers;
  # theirs is what the limit leaves beside the bytes that do not depend on the schedule.
  one, limit = report(make_schedule("1f1b", **sizes)), None
  costs = _costs(stack, mesh, example_batch, microbatches, residuals)
  if memory_limit is not None:
    limit = max(memory_limit - one.total + one.rings, 0) / one.unit
  within: dict[str, Any] = dict(costs=costs, memory=one.units, memory_limit=limit)
  entries = [(entry.label, entry) for entry in compare(**sizes, **within, ticks=TICKS)]
  # By kind, more chunks cost lock-step nothing.
  more = compare(**sizes, **within, chunks=4, ticks=("kind",))
  entries += [(f"{entry.label}, V=4", entry) for entry in more]

  def timed() -> Iterator[Candidate]:
    seen: set[Any] = set()
    for label, entry in entries:
      schedule = entry.timeline and entry.timeline.schedule
      # Some are the same under two names, such as deferred interleaved 1F1B and zb-h1 by kind.
      same = schedule and (schedule.placement.table, schedule.order, schedule.ticks)
      if same in seen:
        continue
      seen.add(same)
      # A schedule whose microbatches skip layers trains another model.
      if schedule and not schedule.paths and stack.depth % schedule.stages == 0:
        try:
          execution = Execution.of(stack, schedule, mesh, residuals=residuals, slack=slack)
        except StackError:  # such as two homes of a stage, beside statistics that count
          continue
        times = scale_costs(costs, schedule.devices, schedule.stages)
        segments = execution.segments(unroll)
        time = estimated_time(execution.program, segments, times, blocking=blocks(mesh))
        yield Candidate(label, schedule, time)

  candidates = sorted(timed(), key=lambda candidate: candidate.time)
  choice = _choose(candidates, lambda schedule: report(schedule).total, memory_limit)
  if choice is None:
    raise ValueError(
      f"no schedule fits a memory_limit of {memory_limit:,.0f} bytes a device; 1f1b needs"
      f" {one.total:,}, of which {one.rings:,} are the schedule's: use a thriftier residual policy,"
      " smaller microbatches or more stages"
    )
  return choice


def _costs(stack: LayerStack, mesh: Mesh, batch: Tree, microbatches: int, residuals: Any) -> Costs:
  """Counts the FLOPs of the stack's F, I and W on one data shard's share of a microbatch."""
  each = microbatches * row_shards(mesh)
  shapes = map_entries(
    lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // each, *leaf.shape[1:]), leaf.dtype),
    lambda entry: entry,
    batch,
  )
  return counted_costs(stack, shapes, stages_of(mesh), residuals)


def _choose(
  candidates: list[Candidate], held: Callable[[Schedule], int], limit: float | None
) -> Choice | None:
  """Chooses the leanest of those that fit and are as fast as the fastest that fits.

  Args:
    candidates: sorted by time; the memory of the slow ones is never asked for.
    held: estimates the bytes of one device.
    limit: bytes that it may hold; None: any number.

  Returns:
    The choice; None where nothing fits.
  """
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
