"""What a step will hold on each device, read off the schedule before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import DATA
from jaxpipe.parallel.placing import check_mesh, layers_per_stage
from jaxpipe.pipeline.batch import check_rows
from jaxpipe.pipeline.program import lower
from jaxpipe.pipeline.residuals import residual_policy
from jaxpipe.pipeline.rings import wide
from jaxpipe.pipeline.stage import cut_stack
from jaxpipe.schedules import Schedule

Tree = Any


def expected_memory(
  stack: Any, schedule: Schedule, mesh: Mesh, example_batch: Tree, *, residuals: str = "dots"
) -> dict[str, int]:
  """Returns bytes per device by kind, the same on every device.

  Args:
    stack: the `LayerStack`.
    schedule, mesh, residuals: as for `pipeline_value_and_grad`.
    example_batch: a batch or its shapes, leaves `[B, ...]`.

  Returns:
    `parameters`; `gradients` (their sums); and the rings, length times bytes of a slot:
    `activations` and `gradient_ring` (what travels), `residuals` (what F keeps), `waiting` (what I
    leaves for W). The optimizer and XLA's workspace, one microbatch of one layer, come on top.
  """
  check_mesh(schedule, mesh)
  program = lower(schedule.check())
  each = layers_per_stage(stack.depth, schedule)
  shapes = stack.param_shapes()
  shards = dict(mesh.shape).get(DATA, 1)
  rows = check_rows(example_batch, program.microbatches, shards) // shards
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), example_batch
  )
  x = jax.eval_shape(stack.apply_embed, shapes["embed"], one)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  in_rows = jax.ShapeDtypeStruct((jax.tree.leaves(one)[0].shape[0],), jnp.int32)
  key = jax.eval_shape(jax.random.key, 0)
  inputs = dict(batch=one, key=key, layer=number, microbatch=number, rows=in_rows)
  layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), shapes["layers"])
  stage = cut_stack(
    stack, layer, inputs, x, each, residual_policy(residuals), lambda shapes, slots: None
  )
  held = {**shapes, "layers": [layer] * (each * schedule.chunks)}
  sums = {**held, "head": stack.head_params(shapes)}  # a tied table is summed at both ends
  rings = {
    name: program.length(name) * _bytes(slot)
    for name, slot in stage.slots(jax.tree.leaves(x)).items()
  }
  return {
    "parameters": _bytes(held),
    "gradients": _bytes(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, wide(p.dtype)), sums)),
    "activations": rings["activations"],
    "residuals": rings["residuals"],
    "gradient_ring": rings["gradients"],
    "waiting": rings["waiting"],
  }


def _bytes(tree: Tree) -> int:
  return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
