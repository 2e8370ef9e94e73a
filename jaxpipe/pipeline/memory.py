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
from jaxpipe.pipeline.split import float_leaves
from jaxpipe.pipeline.stage import cut_stack
from jaxpipe.schedules import Kind, Schedule

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
    `parameters`; `replicas` (the copy of all stages, where some have replicas); `gradients` (their
    sums); and the rings, length times bytes of a slot:
    `activations` and `gradient_ring` (what travels), and `saved` (what F and R keep and what I
    leaves for W). The optimizer and XLA's workspace, one microbatch of one layer, come on top.
  """
  check_mesh(schedule, mesh)
  policy = residual_policy(residuals)
  program = lower(schedule.check(), keeps_input=policy.stage_input)
  each = layers_per_stage(stack.depth, schedule)
  shapes = stack.param_shapes()
  shards = dict(mesh.shape).get(DATA, 1)
  rows = check_rows(example_batch, schedule.microbatches, shards) // shards
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), example_batch
  )
  x = jax.eval_shape(stack.apply_embed, shapes["embed"], one)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  in_rows = jax.ShapeDtypeStruct((jax.tree.leaves(one)[0].shape[0],), jnp.int32)
  key = jax.eval_shape(jax.random.key, 0)
  inputs = dict(batch=one, key=key, layer=number, microbatch=number, rows=in_rows)
  layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), shapes["layers"])
  recompute = Kind.R in program.kinds
  stage = cut_stack(
    *(stack, layer, inputs, x, each, policy, lambda shapes, lengths: []), recompute=recompute
  )
  _, lengths = program.cells(stage.layout.values)
  held = [layer] * (each * schedule.chunks)
  # A stage with replicas is stored by one device, and copied to the others for the step.
  copied = schedule.placement.replicated
  stored = [layer] * (stack.depth // schedule.devices)
  sums = {**shapes, "layers": held, "head": stack.head_params(shapes)}  # a tied table twice
  return {
    "parameters": _bytes({**shapes, "layers": stored}),
    "replicas": _bytes(held) if copied else 0,
    "gradients": _bytes(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, wide(p.dtype)), sums)),
    "activations": program.length("activations") * _bytes(x),
    "gradient_ring": program.length("gradients") * _bytes(float_leaves(x)),
    "saved": sum(n * _bytes(cell) for n, cell in zip(lengths, stage.layout.pools, strict=True)),
  }


def _bytes(tree: Tree) -> int:
  return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
