"""Measures when each action of a real step ran, and plans the same step from mean durations.

Both results are a `Timeline` of one schedule, in seconds. The measured one comes from clock
readings inside the program (`device/probe.py`). The planned one takes the mean duration of every
action on every stage, and lets devices wait for their neighbours as the shape of the program
(`unroll`) makes them. Where the two differ, either the program waits for something that the plan
does not know of, or an action does not always take equally long.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.device.order import blocks
from jaxpipe.pipeline.device.probe import Clock
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.executor import compile_step
from jaxpipe.pipeline.layer.residuals import Policy
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.pipeline.table.program import IDLE, Program
from jaxpipe.pipeline.table.segment import Segment
from jaxpipe.pipeline.table.tick_times import exchanges, tick_durations, tick_times
from jaxpipe.schedules import Costs, Kind, Schedule, Timeline, simulate
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.ticks import ticks as ticks_of
from jaxpipe.stack.stack import LayerStack

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """A measured step; all times are in seconds, each the median of several steps.

  Attributes:
    timeline: when each action ran, counted from the first start. Its schedule is what the program
      runs: of overlapped pairs the parts, one after the other.
    hop: from the moment at which the devices of an exchange have made what they send to the start
      of the receiver's next tick.
    outside: time of a step before its first action and after its last.
    step: a step without clock readings.
    program: the tick table that ran.
    segments: how its ticks were divided into loops and straight lines.
    blocking: whether a sender waits for its receiver.
  """

  timeline: Timeline
  hop: float
  outside: float
  step: float
  program: Program
  segments: tuple[Segment, ...]
  blocking: bool

  @property
  def costs(self) -> Costs:
    """Mean durations by stage.

    Embedding and head are part of the actions of the first and the last stage. A fused B stands as
    an I of its length beside a W that takes nothing.
    """
    return mean_costs(self.timeline, self.hop)

  def planned(self) -> Timeline:
    """The timeline at these costs, of a program of this shape."""
    return self._of(tick_durations(self.program, self.costs))

  def replayed(self) -> Timeline:
    """The timeline planned from every action's own duration in place of means.

    Where this still differs from the measured one, the cause is not in the durations.
    """
    durations = np.zeros((self.program.ticks, self.program.schedule.devices))
    for d, row in enumerate(ticks_of(self.program.schedule, self.program.slack)):
      times = zip(row, self.timeline.start[d], self.timeline.end[d], strict=True)
      for tick, start, end in times:
        durations[tick, d] = end - start
    return self._of(durations)

  def free(self) -> Timeline:
    """The schedule simulated at these costs, with devices that wait for their inputs alone."""
    return simulate(self.program.schedule, self.costs)

  def _of(self, durations: np.ndarray) -> Timeline:
    begins, ends = tick_times(
      self.program, self.segments, durations, self.hop, blocking=self.blocking
    )
    return _timeline(self.program, np.stack([begins[:-1], ends], axis=-1))

  @property
  def predicted_step(self) -> float:
    """Seconds of a whole step by the plan; compare with `step`."""
    return self.planned().makespan + self.outside


def measure(
  stack: LayerStack,
  schedule: Schedule,
  mesh: Mesh,
  params: Tree,
  batch: Tree,
  key: jax.Array | None = None,
  state: Tree | None = None,
  *,
  steps: int = 5,
  residuals: str | Policy = "dots",
  slack: int = 0,
  unroll: str = "auto",
) -> Measured:
  """Runs a step several times, with clock readings round every action and without.

  Where several processes run the program, their clocks must be one, as on one machine.

  Args:
    stack, schedule, mesh, residuals, slack, unroll: as for `pipeline_value_and_grad`.
    params, batch, key, state: as for the step that it returns.
    steps: how many of each are timed, after one of each that is not.

  Raises:
    ValueError: fewer than one step, and what `pipeline_value_and_grad` raises.
  """
  if steps < 1:
    raise ValueError(f"steps={steps} measure nothing; use 1 or more")
  if not mode_of(stack).looped:
    raise ValueError("actions are timed of layers of one kind, and the stack's are not alike")
  execution = Execution.of(stack, schedule, mesh, residuals=residuals, slack=slack)
  program, parts = execution.program, execution.segments(unroll)
  clock = Clock(mesh.axis_names)
  plain = compile_step(execution, unroll)
  probed = compile_step(dataclasses.replace(execution, probe=clock), unroll)
  seconds, times = [], []
  for _ in range(1 + steps):
    # In turn, so that whatever else the machine does meets both alike.
    pair = [_seconds(run, params, batch, key, state) for run in (plain, probed)]
    seconds.append(pair)
    times.append(_times(clock, program, mesh))
    clock.readings.clear()
  step, step_probed = np.median(seconds[1:], axis=0)
  # Devices that have nothing to do yet read the clock as well.
  acting = program.table["kind"] != IDLE
  # Medians keep the order: what came first in every step still does.
  ticks = np.median([t - t[acting].min() for t in times[1:]], axis=0)
  timeline = _timeline(program, ticks)
  return Measured(
    timeline=timeline,
    hop=_hop(program, parts, ticks),
    outside=float(step_probed) - timeline.makespan,
    step=float(step),
    program=program,
    segments=parts,
    blocking=blocks(mesh),
  )


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
  begin = time.perf_counter()
  jax.block_until_ready(run(*arguments))
  seconds = time.perf_counter() - begin
  # The last readings need not be noted when the results are there.
  jax.effects_barrier()
  return seconds


def _times(clock: Clock, program: Program, mesh: Mesh) -> np.ndarray:
  """Seconds [ticks, P, 2] of one step's readings, from all processes."""
  P = mesh.shape[STAGE]
  nanoseconds = np.zeros((P, 2, program.ticks), np.int64)
  for d in {device for device, _, _ in clock.readings}:
    for point in (0, 1):
      row = [when for device, at, when in clock.readings if (device, at) == (d, point)]
      if len(row) != program.ticks:
        raise RuntimeError(f"device {d}: {len(row)} readings of {program.ticks} ticks")
      nanoseconds[d, point] = row
  if jax.process_count() > 1:
    # As halves: without double precision JAX would cut them to 32 bits. Who has not a device has
    # zeros for it.
    halves = multihost_utils.process_allgather(nanoseconds.view(np.int32))
    nanoseconds = np.ascontiguousarray(halves).view(np.int64).max(axis=0)
  return nanoseconds.transpose(2, 0, 1) / 1e9


def _timeline(program: Program, ticks: np.ndarray) -> Timeline:
  # By position and not by action: a gather of a stage's weights may stand in a list several times.
  rows = [
    [ticks[tick, d].tolist() for tick in row]
    for d, row in enumerate(ticks_of(program.schedule, program.slack))
  ]
  held = peaks(program.schedule)
  return Timeline(
    schedule=program.schedule,
    start=tuple(tuple(start for start, _ in row) for row in rows),
    end=tuple(tuple(end for _, end in row) for row in rows),
    busy=tuple(sum(end - start for start, end in row) for row in rows),
    peak_activations=held.activations,
    peak_pending_weight_grads=held.pending_weight_grads,
    peak_memory=held.memory,
  )


def _hop(program: Program, segments: tuple[Segment, ...], ticks: np.ndarray) -> float:
  """Median over all that is received, of the time after both ends of the exchange were ready."""
  gaps = []
  for segment in segments:
    pairs = [exchanges(body) for body in segment.bodies(program.doing)]
    for tick in range(segment.start, min(segment.stop, program.ticks - 1)):
      sources, targets = pairs[(tick - segment.start) % segment.period]
      sent = ticks[max(tick - program.slack, 0), sources, 1]
      gaps += (ticks[tick + 1, targets, 0] - np.maximum(sent, ticks[tick, targets, 1])).tolist()
  return max(0.0, float(np.median(gaps))) if gaps else 0.0


def mean_costs(timeline: Timeline, hop: float = 0.0) -> Costs:
  """Costs under which every stage does in all the work that it did in a timeline.

  Args:
    timeline: of F, R, I, W, B, S, T and G, no two of them at once on one device.
    hop: latency between devices.
  """
  S = timeline.schedule.stages
  total = {kind: np.zeros(S) for kind in Kind}
  count = {kind: np.zeros(S) for kind in Kind}
  for row in zip(timeline.schedule.order, timeline.start, timeline.end, strict=True):
    for step, start, end in zip(*row, strict=True):
      for action in step.parts:
        total[action.kind][action.stage] += end - start
        count[action.kind][action.stage] += 1

  def mean(kind: Kind) -> np.ndarray:
    """Mean duration of an action of this kind, by stage; 0 where there is none."""
    return total[kind] / np.maximum(count[kind], 1)

  # A fused B is divided as I and W are where a schedule has them beside it.
  apart = mean(Kind.I) + mean(Kind.W)
  share = np.where(apart > 0, mean(Kind.W) / np.where(apart > 0, apart, 1), 0)
  I = total[Kind.I] + total[Kind.B] * (1 - share)
  W = total[Kind.W] + total[Kind.B] * share
  each = np.maximum(count[Kind.I] + count[Kind.B], 1)
  # S and T share three P-ths of the head.
  shards = sum(float(mean(kind).sum()) for kind in (Kind.S, Kind.T)) / 3
  return Costs(
    mean(Kind.F).tolist(),
    (I / each).tolist(),
    (W / each).tolist(),
    hop,
    recompute=mean(Kind.R).tolist(),
    head=shards,
    gather=mean(Kind.G).tolist() if count[Kind.G].any() else 0,
  )
