"""Predicts over the pipeline: the last layer's output for every row of a batch, forwards only.

Rows are divided into microbatches, as in training, and the last of them are filled up. Each device
runs its own stages, so that none holds the model; the device of the last stage leaves the outputs
of its rows in a buffer, which a sum over all other axes than those of rows hands to its peers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel import axes
from jaxpipe.parallel.check_placed import check_placed
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR
from jaxpipe.parallel.rules import axes_of_entry
from jaxpipe.pipeline.batch import check_rows, filled_up, given_state, rows_spec
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.executor import walk
from jaxpipe.schedules import Schedule
from jaxpipe.stack.context import Filled, leaves_of_rows
from jaxpipe.stack.stack import LayerStack

Tree = Any


def pipeline_predict(stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Callable[..., Tree]:
  """Returns the prediction of a stack's last layer over the pipeline, in evaluation mode.

  Args:
    stack: a `LayerStack`, whose head does not run.
    schedule: any legal one, of which only the forwards run. Where its microbatches skip stages,
      predictions pass all of them.
    mesh: as for `pipeline_value_and_grad`.

  Returns:
    `predict(params, batch, state=None) -> y`, with leaves `[B, ...]` for a batch of leaves
    `[B, ...]`, B of any size. Where the first leaf of the batch is sharded over a mesh, so are the
    rows of y; of a batch on one device y lies there; of NumPy arrays, which every process has
    whole, y lies whole on every device. A program is compiled for every number of rows of a
    microbatch.

  Raises:
    ValueError, ScheduleError: as for `pipeline_forward`; a mesh with `sequence`, along which layers
      cut positions; when it is called, an output without rows.
  """
  if (n := dict(mesh.shape).get(SEQUENCE, 1)) > 1:
    # By parts of their own, which need not be stretches: nothing says how to put them together.
    raise ValueError(
      f"predict cannot put together outputs whose positions the layers have cut over sequence:{n};"
      " unplace the parameters, and place them on a mesh without it"
    )
  all_stages = _through_all_stages(schedule)
  execution = Execution.of_forwards(stack, all_stages, mesh, predicts=True)
  run = functools.partial(_predict, execution)
  # One compiled program, and one that cuts off rows, for every place that results may have.
  runs: dict[NamedSharding, tuple[Callable[..., Tree], Callable[..., Tree]]] = {}

  def predict(params: Tree, batch: Tree, state: Tree | None = None) -> Tree:
    state = given_state(execution.stack, state)
    check_placed(params, execution.stack, all_stages, mesh, state)
    B = check_rows(batch, 1)
    _, first = leaves_of_rows(batch)[0]
    arrays = jax.tree.map(functools.partial(_on_mesh, mesh), batch)
    filled = filled_up(arrays, all_stages.microbatches, execution.shards)
    filled = filled.batch if isinstance(filled, Filled) else filled
    if isinstance(first, jax.core.Tracer):  # inside the caller's own jit, which places the result
      return jax.tree.map(lambda leaf: leaf[:B], run(params, state, filled))
    place = _place_of_rows(first, mesh)
    if place not in runs:
      runs[place] = (
        jax.jit(run, out_shardings=place),
        jax.jit(_first_rows, static_argnums=1, out_shardings=place),
      )
    whole, cut = runs[place]
    y = whole(params, state, filled)
    y = y if filled is arrays else cut(y, B)
    alone = isinstance(first, jax.Array) and len(first.sharding.device_set) == 1
    return jax.device_put(y, first.sharding) if alone and first.is_fully_addressable else y

  return predict


def _first_rows(y: Tree, B: int) -> Tree:
  """The first B rows of every leaf."""
  return jax.tree.map(lambda leaf: leaf[:B], y)


def _on_mesh(mesh: Mesh, leaf: Any) -> Any:
  """A leaf of the batch as the program takes it: on the devices of the mesh, or in NumPy."""
  if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
    return leaf
  if leaf.sharding.device_set == {*mesh.devices.flat}:
    return leaf
  # Of several processes each has an array of its own, and all the same one, as of NumPy arrays.
  return np.asarray(leaf) if jax.process_count() > 1 else jax.device_put(leaf, _replicated(mesh))


def _replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, Spec())


def _place_of_rows(first: Any, mesh: Mesh) -> NamedSharding:
  """Where outputs lie: rows as those of the batch's first leaf, or all on every device."""
  at = getattr(first, "sharding", None)
  if isinstance(at, NamedSharding) and at.device_set == {*mesh.devices.flat}:
    return NamedSharding(at.mesh, Spec(*at.spec[:1]))
  return _replicated(mesh)


def _predict(execution: Execution, params: Tree, state: Tree, batch: Tree) -> Tree:
  """Outputs of a batch whose rows can be divided, leaves `[B, ...]`."""
  local = functools.partial(_outputs, execution)
  y = execution.over_mesh(local, rows_spec(execution.mesh))(params, state, batch, None)
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), y)


def _outputs(execution: Execution, params: Tree, state: Tree, batch: Tree, key: None) -> Tree:
  """One device's rows of the outputs, leaves `[M, rows, ...]`; inside `shard_map`."""
  device = execution.build(params, state, batch, key)
  outputs = walk(execution, execution.segments("none"), device).outputs
  kept = axes_of_entry(rows_spec(execution.mesh)[1])
  others = tuple(axis for axis in execution.axes if axis not in kept)
  # Of devices that have computed the same, one hands it out; those of other stages have zeros.
  mine = jnp.asarray(axes.index(TENSOR)) == 0

  def hand_out(leaf: jax.Array) -> jax.Array:
    wide = leaf.astype(jnp.int32) if leaf.dtype == bool else leaf
    out: jax.Array = lax.psum(jnp.where(mine, wide, jnp.zeros_like(wide))[:-1], others)
    return out.astype(leaf.dtype)

  return jax.tree.map(hand_out, outputs)


def _through_all_stages(schedule: Schedule) -> Schedule:
  """A schedule with the same placement whose forwards pass all stages."""
  if schedule.paths is None:
    return schedule
  M = range(schedule.microbatches)
  # All forwards, then all backwards, which do not run, but without which no schedule is legal.
  order = [
    [f"{s}F{m}" for m in M for s in sorted(row)]
    + [f"{s}B{m}" for m in M for s in sorted(row, reverse=True)]
    for row in schedule.placement.table
  ]
  return Schedule.from_tokens(order, schedule.placement, name=schedule.name)
