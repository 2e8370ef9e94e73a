"""Chooses the parts that a device is made of, by how its stack lies.

uniform stack: layers of one kind      packed stack: stages that are not alike
-----------------------------------    ---------------------------------------
LoopedStage, one split layer           SwitchedStages, every stage split whole
WholeEnds, or ShardedEnds where        InnerEnds: embedding and head stand inside
  the schedule cuts the vocabulary       the first and the last stage
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.mesh import ROWS, SEQUENCE
from jaxpipe.parallel.placing import gather_fsdp
from jaxpipe.parallel.rules import describe
from jaxpipe.pipeline.device.carry import Totals, sum_type
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.inner_ends import InnerEnds
from jaxpipe.pipeline.device.looped_stage import LoopedStage, split_stack
from jaxpipe.pipeline.device.protocols import Ends, StageActions
from jaxpipe.pipeline.device.sharded_ends import ShardedEnds
from jaxpipe.pipeline.device.switched_stages import split_stages, stage_arguments
from jaxpipe.pipeline.device.weights import Weights
from jaxpipe.pipeline.device.whole_ends import WholeEnds
from jaxpipe.pipeline.layer.interpret import opened
from jaxpipe.pipeline.layer.residuals import Residuals
from jaxpipe.pipeline.layer.slices import Slice
from jaxpipe.pipeline.layer.trace import trace_tree
from jaxpipe.pipeline.layer.weight import scale_of, uses_float16, weight_from_batch
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.schedules import Kind
from jaxpipe.stack.protocol import PackedStack, UniformStack, is_packed


class Parts(NamedTuple):
  """What `Device` is made of.

  Attributes:
    context: what the device knows, with the type of the travelling activation.
    stage: the actions of its stages.
    ends: embedding and head.
    weights: the parameters of its layers.
    totals: zeros of the sums of loss, weight and metrics.
  """

  context: DeviceContext
  stage: StageActions
  ends: Ends
  weights: Weights
  totals: Totals


# The sums of a prediction, which runs no head.
_NO_SUM: Any = jax.ShapeDtypeStruct((), jnp.float32)
_NOTHING = Totals(_NO_SUM, _NO_SUM, {})


def build_parts(
  stack: UniformStack | PackedStack,
  context: DeviceContext,
  *,
  pieces: Tree,
  specs: Tree,
  layers: int,
  policy: Residuals | None,
) -> Parts:
  """Traces a stage, splits it into its actions, and finds the types of all that travels.

  Args:
    stack: the stack, as it is laid out.
    context: the device, as yet without an `x`.
    pieces: parameters of the device's layers, leaves `[V * layers, ...]`, of which each device
      along `fsdp` owns a piece.
    specs: partition specs of `pieces`.
    layers: layers of a stage; rows of a stage where the stack is packed, which is 1.
    policy: what F keeps; None where only forwards run.
  """
  if is_packed(stack):
    return _switched(stack, context, pieces=pieces, specs=specs, layers=layers, policy=policy)
  return _looped(stack, context, pieces=pieces, specs=specs, layers=layers, policy=policy)


def _looped(
  stack: UniformStack,
  context: DeviceContext,
  *,
  pieces: Tree,
  specs: Tree,
  layers: int,
  policy: Residuals | None,
) -> Parts:
  """The parts for layers of one kind; arguments as of `build_parts`."""
  batch = context.microbatch(jnp.int32(0))
  # `x` must be known before the layer is split: the split traces the layer on it.

  def embedding(params: Tree, state: Tree, batch: Tree) -> Tree:
    return stack.apply_embed(params, batch, state=state)

  def heading(params: Tree, state: Tree, x: Tree, batch: Tree) -> Tree:
    return stack.apply_head(params, x, batch, state=state)

  embed, structure = trace_tree(
    embedding, context.params["embed"], context.frozen_of("embed"), batch
  )
  x = jax.tree.unflatten(structure, [v.aval for v in opened(embed).outvars])
  context = dataclasses.replace(context, x=context.zeros(x))
  layer = jax.eval_shape(lambda: rings.get(gather_fsdp(specs, pieces), 0))
  stage = split_stack(
    stack,
    context,
    layer,
    {
      **_layer_inputs(context),
      **({"state": rings.get(context.uniform_state["layers"], 0)} if context.uniform_state else {}),
    },
    layers,
    policy,
    held=layers * context.program.schedule.placement.chunks,
    recompute=Kind.R in context.program.kinds,
    # On TPU, XLA then computes the attention of I more than once: a third more cycles.
    fetch=context.blocking,
  )
  later = _gathered_by_g(context, stage, layer, stack.shared_rows)
  weights = Weights.of(pieces, specs, later, layers, stack.shared_rows)
  vocabulary = context.program.schedule.vocabulary
  ends: Ends
  # Only types and weight of the sums are wanted; the head itself runs in the methods of `Ends`.
  if context.predicts:
    ends = ShardedEnds(context, stack.vocabulary_ends) if vocabulary else WholeEnds(context, stack)
    return Parts(context, stage, ends, weights, _zeros(context, _NOTHING))
  closed, structure = trace_tree(
    heading, context.params["head"], context.frozen_of("head"), context.x, batch
  )
  head = Slice.of(closed)
  loss, aux = jax.tree.unflatten(structure, [v.aval for v in head.outputs])
  parts = opened(embed).eqns, stage.split.backward.equations, head.equations
  if context.training and any(map(uses_float16, parts)):
    last = len(head.inputs) - len(jax.tree.leaves(batch))
    is_batch = [n >= last for n, _ in enumerate(head.inputs)]
    context = _scaled(context, weight_from_batch(head, is_batch))
  ends = ShardedEnds(context, stack.vocabulary_ends) if vocabulary else WholeEnds(context, stack)
  return Parts(context, stage, ends, weights, _zeros(context, Totals(loss, *aux)))


def _gathered_by_g(
  context: DeviceContext, stage: LoopedStage, layer: Tree, shared: Container[str]
) -> list[bool]:
  """For each leaf of a layer's parameters, whether G gathers it, or it is gathered before the loop.

  What W reads stays gathered for the whole step, for W may come after the weights' release; so does
  what layers of several stages share.
  """
  leaves = jax.tree.leaves(layer)
  if not context.program.gathers:
    return [False for _ in leaves]
  paths = [f"layers/{describe(path)}" for path, _ in jax.tree.leaves_with_path(layer)]
  read = stage.split.weight_grad.reads_given(leaves)
  return [not by_w and path not in shared for path, by_w in zip(paths, read, strict=True)]


def _switched(
  stack: PackedStack,
  context: DeviceContext,
  *,
  pieces: Tree,
  specs: Tree,
  layers: int,
  policy: Residuals | None,
) -> Parts:
  """The parts for unlike stages, all of whose weights are gathered before the first tick."""
  # A packed row holds a whole stage's leaves, which G cannot take apart: all are gathered now.
  later = [False for _ in jax.tree.leaves(pieces)]
  weights = Weights.of(pieces, specs, later, layers, stack.shared_rows)
  # Once a step and not at every use: it is a collective over all stages, and on a tick the stages
  # take different branches.
  shared = context.vary(stack.shared(weights.layers))
  stages = split_stages(
    stack,
    context,
    weights.layers,
    shared,
    _layer_inputs(context),
    policy,
    recompute=Kind.R in context.program.kinds,
  )
  boundaries = stages.boundaries
  context = dataclasses.replace(
    context,
    params={**context.params, "shared": shared},
    x=context.zeros(boundaries.travelling),
  )
  if context.training and any(uses_float16(one.backward.equations) for one in stages.splits):
    head = stages.splits[-1].primal
    params, inputs = jax.eval_shape(
      functools.partial(stage_arguments, stack, stack.depth - 1),
      rows=weights.layers,
      chunk=jnp.int32(0),
      shared=shared,
      state=context.packed_state,
      inputs=_layer_inputs(context),
    )
    is_batch = [False for _ in jax.tree.leaves(params)]
    is_batch += [path[0].key == "batch" for path, _ in jax.tree.leaves_with_path(inputs)]
    is_batch += [False for _ in head.inputs[len(is_batch) :]]  # leaves of x
    context = _scaled(context, weight_from_batch(head, is_batch))
    stages = dataclasses.replace(stages, context=context)
  ends = InnerEnds(context, boundaries.result)
  if context.predicts:
    return Parts(context, stages, ends, weights, _zeros(context, _NOTHING))
  loss, aux = jax.eval_shape(boundaries.result.unpack, context.x)
  return Parts(context, stages, ends, weights, _zeros(context, Totals(loss, *aux)))


def _scaled(
  context: DeviceContext, weigh: Callable[[Sequence[jax.Array]], jax.Array] | None
) -> DeviceContext:
  """The device with a scale of the loss, the same on all devices.

  Args:
    context: the device.
    weigh: the head's weight, given the leaves of a microbatch; None: what it is depends on more,
      and every row counts as one.
  """
  M = context.program.schedule.microbatches

  def weight(m: jax.Array) -> jax.Array:
    leaves = jax.tree.leaves(context.microbatch(m))
    one = jnp.asarray(weigh(leaves) if weigh else len(context.rows), jnp.float32)
    varying: jax.Array = context.vary(one)
    return varying

  # A plain loop over microbatches: a vmapped head might be a program of another kind.
  mine = lax.map(weight, context.vary(jnp.arange(M))).sum()
  whole = lax.psum(mine, tuple(axis for axis in context.axes if axis in (*ROWS, SEQUENCE)))
  # Of devices that have counted the same, so that the type says so: gradients are divided by it.
  same = lax.pmax(whole, tuple(axis for axis in context.axes if axis not in (*ROWS, SEQUENCE)))
  scale = scale_of(same)
  if context.loss_scale is not None:
    scale = scale * context.loss_scale
  return dataclasses.replace(context, loss_scale=scale)


def _layer_inputs(context: DeviceContext) -> Tree:
  """Stand-ins of a layer's further inputs, `LayerInputs`; only their types are read."""
  batch, rows = context.microbatch(jnp.int32(0)), context.rows
  return dict(batch=batch, key=context.key, layer=rows[0], microbatch=rows[0], rows=rows)


def _zeros(context: DeviceContext, totals: Totals) -> Totals:
  zeros: Totals = context.zeros(jax.tree.map(sum_type, totals))
  return zeros
