"""Executes any schedule over any stack, as one SPMD program.

A schedule is lowered to a table of ticks (`program`), whose rows are walked, in loops and straight
lines (`unroll`), inside one `shard_map`, manual over every mesh axis: each device (`device`) walks
its own column. What was summed on the way is reduced over the mesh once, after the last tick.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel import axes, replicas
from jaxpipe.parallel.mesh import FSDP, ROWS, STAGE, TENSOR, row_shards
from jaxpipe.parallel.placing import (
  check_mesh,
  check_placed,
  gather_fsdp,
  layers_per_stage,
  own_pieces,
  param_specs,
  scatter_fsdp,
)
from jaxpipe.parallel.rules import axes_of_entry
from jaxpipe.pipeline.batch import given_state, microbatches, rows_spec
from jaxpipe.pipeline.device.context import Carry, DeviceContext, Totals
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.device.order import blocks
from jaxpipe.pipeline.device.probe import Probe
from jaxpipe.pipeline.layer.residuals import AUTO, Policy, Residuals, residual_policy
from jaxpipe.pipeline.layer.varying import vary
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.program import Program
from jaxpipe.pipeline.table.unroll import Segment, cut
from jaxpipe.schedules import Schedule

Tree = Any


def pipeline_value_and_grad(
  stack: Any,
  schedule: Schedule,
  mesh: Mesh,
  *,
  residuals: str | Policy = AUTO,
  slack: int = 0,
  unroll: str = "auto",
  poison: bool = False,
  probe: Probe | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Tree], Tree]]:
  """Returns the pipelined counterpart of `jax.value_and_grad` of a stack's mean loss.

  Args:
    stack: a `LayerStack`.
    schedule: any legal schedule of F, R, B, I, W, S, T, G and X, over any placement; stages with
      replicas add their gradients. Where the mesh has `fsdp`, weights are gathered at each G; or
      once a step, by a schedule without G.
    mesh: from `make_mesh`, its axis `stage` of `schedule.devices`. Rows of the batch lie over
      `data`, `fsdp` and `expert`; the stack's `rules` say what lies over the other axes.
    residuals: what F keeps: `dots` (matmuls with weights, never attention scores), `all`, `full`
      (the stage's input alone), `auto` (`dots`, and `full` for unlike stages), a policy of
      `jax.checkpoint_policies` by name or as a function, or `names:A,B` for what `checkpoint_name`
      named; see `residuals`.
    slack: ticks that a transfer may take beyond the one that sends it: with 1, it runs beside the
      next tick's work, and is used the tick after.
    unroll: `none`, one loop over all ticks; `ends`, loops over what is periodic and straight lines
      elsewhere, with no exchange but where something is sent; `all`, one straight line; `auto`, by
      estimated cost, of unlike stages `none`.
    poison: fill with NaN whatever no action has written; for tests.
    probe: reads the clock round every action; see `timeline`.

  Returns:
    `step(params, batch, key=None) -> ((loss, metrics), grads)`, or of a stack with state
    `step(params, batch, key, state) -> ((loss, metrics, state), grads)`, where floats of the new
    state are the mean of what the microbatches made of the old, whole numbers the largest. It is
    compiled at its first call; it may
    also be called inside `jax.jit`, where nothing checks that params were placed. `params` placed
    (`jaxpipe.place` or `stack.init(key, batch, schedule, mesh)`); `batch` leaves `[B, ...]`, where
    microbatch m is rows `m*B/M ... (m+1)*B/M` and each data shard holds an equal slice of every
    microbatch; `key` seeds dropout. `loss` is sum(loss_sum) / sum(weight), NaN where all weights
    are zero; `metrics` are summed; `grads` has the tree and layout of `params`, in float32 at
    least.

  Raises:
    ValueError: layers that do not fill the stages, a mesh of another size than the schedule's, rows
      that do not divide, parameters that were not placed.
    ScheduleError: a schedule that is not legal, or an action kind that cannot be executed.
  """
  stack = stack.laid_out(schedule)
  policy = residual_policy(residuals, stack.uniform)
  program = lower_on(schedule, mesh, policy, slack, head_apart=stack.uniform)
  return _compile(Execution(stack, program, mesh, schedule, policy, poison, probe), unroll)


def pipeline_forward(
  stack: Any, schedule: Schedule, mesh: Mesh, *, poison: bool = False
) -> Callable[..., tuple[jax.Array, Tree]]:
  """Returns the evaluation of a stack's loss over the same pipeline: forwards only, no dropout.

  Args:
    stack, schedule, mesh, poison: as for `pipeline_value_and_grad`; of the schedule, only the
      forwards run.

  Returns:
    `evaluate(params, batch) -> (loss, metrics)`, or `evaluate(params, batch, state)`, jitted, as
    above; running statistics take the place of a microbatch's own. Forced CPU devices share
    threads: wait for the result of one call before making many more, or XLA may run out of them.
  """
  stack = stack.laid_out(schedule)
  program = lower(schedule.check().forward_only())
  run = _compile(Execution(stack, program, mesh, schedule, None, poison), "none")
  return lambda params, batch, state=None: run(params, batch, None, state)[0][:2]


def lower_on(
  schedule: Schedule, mesh: Mesh, policy: Residuals, slack: int, *, head_apart: bool = True
) -> Program:
  """The program of a schedule, on a mesh that may cut its weights."""
  return lower(
    schedule.check(),
    keeps_input=policy.stage_input,
    slack=slack,
    gathers=dict(mesh.shape).get(FSDP, 1) > 1,
    head_apart=head_apart,
  )


@dataclasses.dataclass(frozen=True)
class Execution:
  """What is to run, and where.

  Attributes:
    stack, mesh, poison, probe: as for `pipeline_value_and_grad`.
    program: the schedule's, or that of its forwards.
    schedule: the whole one, which says where the parameters lie.
    policy: what F keeps; None where only forwards run.

  Raises:
    ValueError: the mesh is of another size, the layers do not fill the stages, devices cannot own
      equally many of them, or the stack lacks what a vocabulary cut over the stages needs.
  """

  stack: Any
  program: Program
  mesh: Mesh
  schedule: Schedule
  policy: Residuals | None
  poison: bool = False
  probe: Probe | None = None

  def __post_init__(self) -> None:
    check_mesh(self.schedule, self.mesh)
    layers_per_stage(self.stack.depth, self.schedule)
    replicas.owned(self.schedule.placement)
    _ = self.specs  # raises where the parameters do not fit the mesh

  @property
  def axes(self) -> tuple[str, ...]:
    """Names of the mesh axes."""
    return tuple(self.mesh.axis_names)

  @property
  def shards(self) -> int:
    """Devices that hold different rows of a microbatch."""
    return row_shards(self.mesh)

  @property
  def layers(self) -> int:
    """Layers of a stage."""
    return layers_per_stage(self.stack.depth, self.schedule)

  @functools.cached_property
  def specs(self) -> Tree:
    """Partition specs of the parameters."""
    return param_specs(self.stack.param_shapes(), self.stack, self.schedule, self.mesh)

  @functools.cached_property
  def state_shapes(self) -> Tree:
    """Shapes of the state; none where the stack has none."""
    return self.stack.state_shapes() if self.stack.has_state else {}

  @functools.cached_property
  def state_specs(self) -> Tree:
    """Partition specs of the state."""
    return param_specs(self.state_shapes, self.stack, self.schedule, self.mesh)

  def over_mesh(self, local: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """`local(params, state, batch, key)` on every device, each with its own part of all."""
    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(self.specs, self.state_specs, rows_spec(self.mesh), Spec()),
      out_specs=out_specs,
    )

  def build(self, params: Tree, state: Tree, batch: Tree, key: Any) -> tuple[Device, Any]:
    """The device that this is, and its table of cells; inside `over_mesh`."""
    layers = replicas.gather(params["layers"], self.schedule.placement, self.layers)
    layers = vary(layers, self.axes)
    ends = {part: gather_fsdp(self.specs[part], params[part]) for part in ("embed", "head")}
    ends = vary({**ends, "head": self.stack.head_params(ends)}, self.axes)
    rows = jnp.arange(jax.tree.leaves(batch)[0].shape[1], dtype=jnp.int32)
    rows += axes.index(ROWS) * len(rows)
    batch, key, rows = vary((batch, key, rows), self.axes)
    here = DeviceContext(
      *(self.stack, self.program, self.axes, self.poison, blocks(self.mesh), self.probe),
      *(ends, batch, key, rows, self.policy is not None, self._state_rows(state)),
    )
    return Device.build(here, layers, self.specs["layers"], self.layers, self.policy)

  def _state_rows(self, state: Tree) -> Tree:
    """Rows of the state of all stages that a device holds."""
    if not state:
      return {}
    whole = gather_fsdp(self.state_specs, state)["layers"]["state"]
    return vary(replicas.gather(whole, self.schedule.placement, self.layers), self.axes)

  def run(
    self, segments: Sequence[Segment], params: Tree, state: Tree, batch: Tree, key: Any
  ) -> Any:
    """Walks the table and sums up; inside `over_mesh`."""
    device, cells = self.build(params, state, batch, key)
    table = self._table(cells)
    carry = device.start()
    for segment in segments:
      carry = _run(device, carry, segment, table)
    loss, metrics, weight = _totals(carry, self.axes)
    if not self.policy:
      return (loss, metrics), {}
    grads = self._reduce(carry.grads, weight)
    if not state:
      return (loss, metrics), grads
    return (loss, metrics, self._next_state(state, device.stage.counted(carry.pools))), grads

  def _next_state(self, state: Tree, counted: Tree) -> Tree:
    """The state after the step: floats are the mean over microbatches and over shards of rows."""
    others = tuple(axis for axis in self.axes if axis != STAGE)
    times = self.schedule.microbatches * self.shards
    mine = replicas.reduce(counted, self.schedule.placement, self.layers)

    def whole(leaf: jax.Array) -> jax.Array:
      if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return lax.psum(leaf, others) / times
      return lax.pmax(leaf, others)

    rows = gather_fsdp(self.state_specs, state)["layers"]
    new = self.stack.renewed(rows, jax.tree.map(whole, mine), lambda tree: vary(tree, {STAGE}))
    inner = jax.tree.map(lambda spec: Spec(None, *spec[1:]), self.state_specs["layers"])
    return {**state, "layers": own_pieces(inner, new)}

  def _reduce(self, grads: Tree, weight: jax.Array) -> Tree:
    """Sums gradients over the mesh, once, and divides by the whole weight, once."""
    grads = scatter_fsdp(self.specs, self.stack.untie(grads))
    summed = replicas.reduce(grads["layers"], self.schedule.placement, self.layers)

    def reduce(spec: Spec, grad: jax.Array) -> jax.Array:
      cut = {axis for entry in spec for axis in axes_of_entry(entry)}
      over = tuple(axis for axis in self.axes if axis not in cut)
      return (lax.psum(grad, over) if over else grad) / weight.astype(grad.dtype)

    return jax.tree.map(reduce, self.specs, {**grads, "layers": summed})

  def _table(self, cells: Any) -> dict[str, jax.Array]:
    """This device's columns of the table."""
    mine = lambda column: jnp.asarray(column)[:, lax.axis_index(STAGE)]  # noqa: E731
    meetings = self.program.meetings
    columns = {**self.program.table, **meetings.slots, **meetings.home, "cells": cells}
    table = vary({name: mine(column) for name, column in columns.items()}, self.axes)
    # All devices take the same side of a conditional round a meeting: its column does not vary.
    whole = {name: jnp.asarray(column) for name, column in meetings.microbatches.items()}
    return {**table, **whole}


def _compile(execution: Execution, unroll: str) -> Callable[..., Any]:
  if unroll == "auto" and not execution.stack.uniform:
    unroll = "none"  # every tick of a straight line would hold the code of every stage
  segments, trains = cut(execution.program, unroll), execution.policy is not None
  after = (execution.state_specs,) if trains and execution.stack.has_state else ()
  sharded = execution.over_mesh(
    functools.partial(execution.run, segments),
    ((Spec(), Spec(), *after), execution.specs if trains else {}),
  )

  @jax.jit
  def run(params: Tree, state: Tree, batch: Tree, key: jax.Array | None) -> Any:
    cut = microbatches(batch, execution.schedule.microbatches, execution.shards)
    return sharded(params, state, cut, key)

  def step(
    params: Tree, batch: Tree, key: jax.Array | None = None, state: Tree | None = None
  ) -> Any:
    state = given_state(execution.stack, state)
    check_placed(params, execution.stack, execution.schedule, execution.mesh, state)
    return run(params, state, batch, key)

  return step


def _run(device: Device, state: Carry, segment: Segment, table: dict[str, jax.Array]) -> Carry:
  """Runs the ticks of one segment."""
  bodies = segment.bodies(device.local.program.doing)

  def body(state: Carry, rows: dict[str, jax.Array]) -> Carry:
    for i, doing in enumerate(bodies):
      row = {name: column[i] for name, column in rows.items()}
      tick = functools.partial(device.tick, row=row, doing=doing)
      state = _once(tick, state) if segment.straight else tick(state)
    return state

  def cut(column: jax.Array) -> jax.Array:
    mine = column[segment.start : segment.stop]
    return mine.reshape(segment.repeats, segment.period, *column.shape[1:])

  rows = {name: cut(column) for name, column in table.items()}
  if segment.repeats == 1:
    return body(state, {name: column[0] for name, column in rows.items()})
  return lax.scan(lambda state, rows: (body(state, rows), None), state, rows)[0]


def _once(tick: Callable[[Carry], Carry], state: Carry) -> Carry:
  """Returns `tick(state)`, from a loop that runs once, which the compiler cannot know.

  What a loop carries stays in place. In a straight line, nothing orders an action that reads a
  buffer before the next one that writes it, and XLA copies the buffer whole.
  """
  one = jnp.minimum(lax.axis_index(STAGE) + 1, 1)
  return lax.fori_loop(0, one, lambda _, state: tick(state), state)


def _totals(state: Carry, over: tuple[str, ...]) -> tuple[jax.Array, Tree, jax.Array]:
  """The mean loss, metrics, and the weight that sums are divided by.

  Devices along `tensor` finish the same microbatches, and each counts them: loss, weight and
  gradients are all as many times too large, which a mean does not show. Metrics are sums.
  """
  totals = Totals(*lax.psum(tuple(state.totals), over))
  times = axes.size(TENSOR)

  def once(metric: jax.Array) -> jax.Array:
    whole = jnp.issubdtype(metric.dtype, jnp.integer)
    return metric // times if whole else metric / times

  metrics = jax.tree.map(once, totals.metrics) if times > 1 else totals.metrics
  return totals.loss / totals.weight, metrics, totals.weight
