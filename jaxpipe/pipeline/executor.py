"""Executes any schedule over any stack, as one SPMD program.

A schedule is lowered to a table of ticks (`table/`), whose rows are walked, in loops and straight
lines, inside one `shard_map` that is manual over every mesh axis: each device walks its own column
(`device/`). What was summed on the way is reduced over the mesh once, after the last tick.

    params, state, batch, key
      │  shard_map over all mesh axes
      ├─ build     trace one layer or every stage, split it into F, R, I, W    (execution, device/)
      ├─ start     allocate rings, pools and sums
      ├─ walk      for each segment of ticks: scan, or straight line           (this file)
      └─ reduce    loss, metrics, gradients, model state: once over the mesh   (this file)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel import axes, replicas
from jaxpipe.parallel.check_placed import check_placed
from jaxpipe.parallel.mesh import FSDP, STAGE, TENSOR
from jaxpipe.parallel.placing import gather_fsdp, map_rows, own_pieces, scatter_fsdp
from jaxpipe.parallel.rules import axes_of_entry
from jaxpipe.pipeline.batch import given_state, look_at_draws
from jaxpipe.pipeline.device.carry import Carry, Totals
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.device.probe import Probe
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.layer.varying import vary
from jaxpipe.pipeline.layer.weight import divisor
from jaxpipe.pipeline.table.segment import Segment
from jaxpipe.pipeline.zero_weights import ZeroWeights
from jaxpipe.schedules import Schedule
from jaxpipe.stack.context import check_key, check_leaves
from jaxpipe.stack.stack import LayerStack

Tree = Any


def pipeline_value_and_grad(
  stack: LayerStack,
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
    state are the mean of what the microbatches made of the old, whole numbers the largest. It takes
    `loss_scale=` besides, a power of two by which gradients are multiplied while they are computed;
    see `LossScale`. It is compiled at its first call. It may also be called inside `jax.jit`, where
    nothing checks that `params` were placed.

      params   placed, by `jaxpipe.place` or by `stack.init(key, batch, schedule, mesh)`
      batch    leaves `[B, ...]`; microbatch m is rows `m*B/M ... (m+1)*B/M`, and each data shard
               holds an equal slice of every microbatch
      key      seeds dropout
      loss     sum(loss_sum) / sum(weight); loss and gradients are 0 where that weight is 0
      metrics  summed over microbatches and data shards
      grads    the tree and layout of `params`, in float32 at least

  Raises:
    ValueError: layers that do not fill the stages, a mesh of another size than the schedule's, rows
      that do not divide, parameters that were not placed.
    ScheduleError: a schedule that is not legal, or an action kind that cannot be executed.
  """
  execution = Execution.of(
    stack, schedule, mesh, residuals=residuals, slack=slack, poison=poison, probe=probe
  )
  return compile_step(execution, unroll)


def pipeline_forward(
  stack: LayerStack, schedule: Schedule, mesh: Mesh, *, poison: bool = False
) -> Callable[..., tuple[jax.Array, Tree]]:
  """Returns the evaluation of a stack's loss over the same pipeline: forwards only, no dropout.

  Args:
    stack: a `LayerStack`.
    schedule: any legal one, of which only the forwards run.
    mesh: as for `pipeline_value_and_grad`.
    poison: fill with NaN whatever no action has written; for tests.

  Returns:
    `evaluate(params, batch) -> (loss, metrics)`, or of a stack with state
    `evaluate(params, batch, state) -> (loss, metrics)`, jitted. Running statistics take the place
    of a microbatch's own. Forced CPU devices share threads: wait for the result of one call before
    making many more, or XLA may run out of them.

  Raises:
    ValueError, ScheduleError: as for `pipeline_value_and_grad`.
  """
  run = compile_step(Execution.of_forwards(stack, schedule, mesh, poison=poison), "none")

  def evaluate(params: Tree, batch: Tree, state: Tree | None = None) -> tuple[jax.Array, Tree]:
    loss, metrics = run(params, batch, None, state)[0][:2]
    return loss, metrics

  return evaluate


def compile_step(execution: Execution, unroll: str) -> Callable[..., Any]:
  """Returns the step of an assembly, which is compiled at its first call.

  Args:
    execution: what runs where; of a training step or of forwards alone.
    unroll: how ticks are divided into loops and straight lines, as for `pipeline_value_and_grad`.

  Returns:
    `step(params, batch, key=None, state=None, *, loss_scale=None)`, which checks that its arguments
    were placed.
  """
  segments, trains = execution.segments(unroll), execution.policy is not None
  after = (execution.state_specs,) if trains and execution.stack.has_state else ()
  weights = ZeroWeights()
  run = jax.jit(
    execution.over_mesh(
      functools.partial(_run, execution, segments),
      (((Spec(), Spec(), *after), execution.specs if trains else {}), Spec()),
    )
  )

  def step(
    params: Tree,
    batch: Tree,
    key: jax.Array | None = None,
    state: Tree | None = None,
    *,
    loss_scale: jax.Array | None = None,
  ) -> Any:
    state = given_state(execution.stack, state)
    check_key(key)
    check_leaves(batch)
    check_placed(params, execution.stack, execution.schedule, execution.mesh, state)
    if key is not None:
      look_at_draws(execution.stack, batch)
    scale = [] if loss_scale is None else [jnp.asarray(loss_scale, jnp.float32)]
    out, weight = run(params, state, batch, key, *scale)
    weights.add(weight)
    return out

  return step


def _run(
  execution: Execution,
  segments: Sequence[Segment],
  params: Tree,
  state: Tree,
  batch: Tree,
  key: Any,
  loss_scale: jax.Array | None = None,
) -> Any:
  """One device's step: walks the table, then reduces over the mesh; inside `shard_map`.

  Args:
    execution: what runs where.
    segments: its ticks, divided into loops and straight lines.
    params, state, batch, key: this device's part; see `Execution.over_mesh`.
    loss_scale: the user's, float32 [].

  Returns:
    `(loss, metrics), grads`, or with model state `(loss, metrics, state), grads`; `grads` is empty
    where only forwards run. And the weight that both were divided by.
  """
  device = execution.build(params, state, batch, key, loss_scale)
  carry = walk(execution, segments, device)
  loss, metrics, weight = _reduce_totals(carry.totals, execution.axes)
  if not execution.policy:
    return ((loss, metrics), {}), weight
  scaled = weight
  if device.context.loss_scale is not None:
    scaled = weight * device.context.loss_scale
  grads = _reduce_grads(execution, carry.grads, scaled)
  if not state:
    return ((loss, metrics), grads), weight
  counted = device.stage.counted(carry.pools)
  return ((loss, metrics, _next_state(execution, state, counted)), grads), weight


def walk(execution: Execution, segments: Sequence[Segment], device: Device) -> Carry:
  """Walks the whole table on one device, inside `shard_map`; returns what it then carries."""
  table = _own_columns(execution, device)
  carry = device.start()
  for segment in segments:
    carry = _walk(device, carry, segment, table)
  return carry


def _own_columns(execution: Execution, device: Device) -> dict[str, jax.Array]:
  """This device's columns of the table, [ticks] each, and `cells`, [ticks, values]."""
  program = execution.program

  def own(column: Any) -> jax.Array:
    return jnp.asarray(column)[:, lax.axis_index(STAGE)]

  collectives = program.collectives
  columns = {**program.table, **collectives.slots, **collectives.home, "cells": device.cells}
  table = vary({name: own(column) for name, column in columns.items()}, execution.axes)
  # All devices take the same side of a conditional round a collective: its column is not this
  # device's own and does not vary, so that JAX lets the branch communicate.
  whole = {name: jnp.asarray(column) for name, column in collectives.microbatches.items()}
  return {**table, **whole}


def _walk(device: Device, carry: Carry, segment: Segment, table: dict[str, jax.Array]) -> Carry:
  """Runs the ticks of one segment: a scan over its repeats, whose body does one period of ticks."""
  bodies = segment.bodies(device.context.program.doing)

  def body(carry: Carry, rows: dict[str, jax.Array]) -> Carry:
    for i, doing in enumerate(bodies):
      row = {name: column[i] for name, column in rows.items()}
      tick = functools.partial(device.tick, row=row, doing=doing)
      carry = _loop_once(tick, carry) if segment.straight else tick(carry)
    return carry

  def of_segment(column: jax.Array) -> jax.Array:
    mine = column[segment.start : segment.stop]
    return mine.reshape(segment.repeats, segment.period, *column.shape[1:])

  rows = {name: of_segment(column) for name, column in table.items()}
  if segment.repeats == 1:
    return body(carry, {name: column[0] for name, column in rows.items()})
  return lax.scan(lambda carry, rows: (body(carry, rows), None), carry, rows)[0]


def _loop_once(tick: Callable[[Carry], Carry], carry: Carry) -> Carry:
  """Returns `tick(carry)`, run by a loop of one turn whose length the compiler cannot know.

  The predicate is the same on all devices, so that the transfers inside are safe. A loop's carry
  stays in place. In a straight line nothing orders an action that reads a buffer before the next
  one that writes it, and XLA copies the buffer whole.
  """
  one = jnp.minimum(lax.axis_index(STAGE) + 1, 1)  # 1 on every device
  return lax.fori_loop(0, one, lambda _, carry: tick(carry), carry)


def _reduce_totals(totals: Totals, over: tuple[str, ...]) -> tuple[jax.Array, Tree, jax.Array]:
  """Sums loss, weight and metrics over the mesh, once a step.

  Devices along `tensor` compute the same microbatches, and each counts them. Loss, weight and
  gradients are then all as many times too large, which their ratio does not show; metrics are sums
  and are divided here.

  Args:
    totals: this device's sums.
    over: all mesh axes.

  Returns:
    The mean loss, the metrics, and the weight by which gradients are divided.
  """
  summed = Totals(*lax.psum(tuple(totals), over))
  times = axes.size(TENSOR)

  def once(metric: jax.Array) -> jax.Array:
    whole = jnp.issubdtype(metric.dtype, jnp.integer)
    return metric // times if whole else metric / times

  metrics = jax.tree.map(once, summed.metrics) if times > 1 else summed.metrics
  exact = jnp.promote_types(summed.loss.dtype, summed.weight.dtype)
  return summed.loss / divisor(summed.weight, exact), metrics, summed.weight


def _reduce_grads(execution: Execution, grads: Tree, weight: jax.Array) -> Tree:
  """Sums gradients over the mesh and divides them by the whole weight, each once a step.

  The embedding's sums come from `Ends.back_at_input`, the head's from `Ends.leave` or
  `Ends.passes`, the layers' from B and W. In this order: tied leaves are added to their owner's,
  pieces along `fsdp` are reduced and scattered, replicas of a stage are added, and the rest is
  summed over every axis that does not cut the leaf.
  """
  grads = scatter_fsdp(execution.specs, execution.stack.untie(grads))
  reduce_replicas = functools.partial(
    replicas.reduce, placement=execution.schedule.placement, layers=execution.layers
  )
  layers = map_rows(reduce_replicas, grads["layers"], execution.stack.shared_rows)

  def reduce(spec: Spec, grad: jax.Array) -> jax.Array:
    cut = {axis for entry in spec for axis in axes_of_entry(entry)}
    over = tuple(axis for axis in execution.axes if axis not in cut)
    return (lax.psum(grad, over) if over else grad) / divisor(weight, grad.dtype)

  return jax.tree.map(reduce, execution.specs, {**grads, "layers": layers})


def _next_state(execution: Execution, state: Tree, counted: Tree) -> Tree:
  """The model state after the step.

  Args:
    execution: what runs where.
    state: this device's part of the state before.
    counted: sums over microbatches of what F has made of it, a list of arrays [V * layers, ...].

  Returns:
    Floats are the mean of what all microbatches and shards of rows made, whole numbers the largest.
  """
  if not counted:
    return state  # nothing of it changes
  M = execution.schedule.microbatches
  mine = replicas.reduce(counted, execution.schedule.placement, execution.layers)

  def whole(leaf: jax.Array, spec: Spec) -> jax.Array:
    cut = {STAGE}.union(*map(axes_of_entry, spec))
    others = tuple(axis for axis in execution.axes if axis not in cut)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      return lax.psum(leaf, others) / (M * axes.size(others))
    return lax.pmax(leaf, others)

  def over_stages(tree: Tree) -> Tree:
    return vary(tree, {STAGE})

  specs = execution.state_specs["layers"]
  rows = gather_fsdp(execution.state_specs, state)["layers"]
  means = list(map(whole, mine, execution.stack.changing_specs(specs)))
  new = execution.stack.renewed(rows, means, over_stages)
  # Only what was gathered is cut again.
  pieces = jax.tree.map(lambda spec: Spec(*(_fsdp_alone(entry) for entry in spec)), specs)
  return {**state, "layers": own_pieces(pieces, new)}


def _fsdp_alone(entry: Any) -> str | None:
  """The entry of a partition spec without any axis but `fsdp`."""
  return FSDP if FSDP in axes_of_entry(entry) else None
