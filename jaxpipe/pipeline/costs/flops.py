"""What a stack's work costs, counted from its equations: for plans made before anything has run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.layer.residuals import Policy, residual_policy
from jaxpipe.pipeline.layer.slices import Slice
from jaxpipe.pipeline.layer.split import split
from jaxpipe.schedules import Costs
from jaxpipe.stack.context import LayerInputs

Tree = Any


def counted_costs(
  stack: Any, microbatch: Tree, devices: int, residuals: str | Policy = "dots"
) -> Costs:
  """Returns durations of F, I and W of a P-th part of the layers, and of the head, by their FLOPs.

  The unit is that F. XLA counts in the programs that it is given, before it optimizes; the body of
  a loop counts once. What waits for memory in place of arithmetic takes longer than this says.

  Args:
    stack: the `LayerStack`.
    microbatch: shapes of one microbatch on one data shard, leaves `[rows, ...]`.
    devices: P.
    residuals: as for `pipeline_value_and_grad`.
  """
  policy, shapes = residual_policy(residuals), stack.param_shapes()
  x, rows = stack.check_shapes(microbatch), jax.tree.leaves(microbatch)[0].shape[0]
  numbers = jnp.arange(rows, dtype=jnp.int32)
  key, number = jax.random.key(0), jnp.int32(0)
  inputs = LayerInputs(batch=microbatch, key=key, layer=number, microbatch=number, rows=numbers)
  layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), shapes["layers"])
  apply = lambda params, inputs, x: (stack.apply_layer(params, x, True, inputs), ())  # noqa: E731
  parts = policy.traced(lambda keep: split(apply, layer, inputs, x, keep))
  head = jax.value_and_grad(stack.apply_head, argnums=(0, 1), has_aux=True, allow_int=True)
  forward = _flops_of(parts.forward) or 1.0
  again = 1.0 if policy.stage_input else 0.0
  top = _flops(head, stack.head_params(shapes), x, microbatch) * devices / stack.depth
  return Costs(
    1.0,
    again + _flops_of(parts.input_grad) / forward,
    _flops_of(parts.weight_grad) / forward,
    # A third each for the head's forward, input gradient and weight gradient.
    head=top / forward / 3,
  )


def _flops_of(part: Slice) -> float:
  avals: list[Any] = [v.aval for v in part.inputs]
  return _flops(part, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))


def _flops(function: Any, *args: Any) -> float:
  counted = jax.jit(function).lower(*args).cost_analysis()
  return float(counted.get("flops", 0)) if counted else 0.0
