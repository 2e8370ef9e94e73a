"""What layers cost in time, counted or measured, for plans made before anything has run.

A layer's forward, input gradient and weight gradient are the slices that the pipeline would run.
Counted, their costs are FLOPs as XLA counts them before it optimizes, the body of a loop once;
measured, seconds on this process's first device, the least of several runs.

    layer_costs     every layer, for the partitioner: the first with the embedding, the last with
                    the head, for they are always in one stage
    counted_costs   a device's share of layers of one kind, for the choice of a schedule
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.costs.workspace import tree_bytes
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.residuals import AUTO, Policy, residual_policy
from jaxpipe.pipeline.layer.slices import LayerSplit, Slice
from jaxpipe.pipeline.layer.split import split
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.schedules import Costs
from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.stack.context import LayerInputs, leaves_of_rows, microbatch_inputs, rows_alone
from jaxpipe.stack.stack import LayerStack

Tree = Any
# What a slice costs.
Price = Callable[[Slice], float]

_REPEATS = 5


def layer_costs(
  stack: LayerStack,
  microbatch: Tree,
  *,
  measured: bool = False,
  residuals: str | Policy = AUTO,
  moments: int = 2,
) -> list[LayerCost]:
  """Returns the cost of every layer, in model order.

  Args:
    stack: a `LayerStack`.
    microbatch: one microbatch or its shapes, leaves `[B / M, ...]`.
    measured: whether to time each layer, which compiles three programs for each kind of layer.
    residuals: as for `pipeline_value_and_grad`; under a policy that keeps a stage's input alone,
      the backward runs the forward again. What F keeps of a layer is counted under the others.
    moments: float32 copies of the parameters that the optimizer keeps, such as Adam's two.

  Returns:
    FLOPs or seconds, and bytes: parameters with gradients and moments, what F keeps of a
    microbatch, what the layer hands on.
  """
  policy = residual_policy(residuals, mode_of(stack).auto_residuals)
  price: Price = _seconds if measured else _flops
  shapes = jax.eval_shape(lambda batch: batch, microbatch)
  seen: list[tuple[Any, Any, tuple[float, float, float]]] = []
  x, found = None, []
  for module, spec in stack.network.specs.items():
    one, y = _split(stack, module, shapes, x, policy.layer if not policy.stage_input else None)
    # Layers of one kind cost the same on inputs of the same types: each is priced once.
    known = (prices for same, was, prices in seen if same.same_kind(spec) and was == _types(x))
    prices = next(known, None)
    if prices is None:
      prices = price(one.forward), price(one.input_grad), price(one.weight_grad)
      seen.append((spec, _types(x), prices))
    forward, input_grad, weight_grad = prices
    # A policy that keeps the stage's input alone runs the forward again inside I.
    again = forward if policy.stage_input else 0.0
    values = () if policy.stage_input else one.saved
    kept = sum(math.prod(v.shape) * jnp.dtype(v.dtype).itemsize for v in values)
    params = jax.tree.leaves(stack.network.own(module, spec.shapes))
    found.append(
      LayerCost(
        f"{spec.name} {spec.kind.__name__}",
        forward,
        input_grad + again,
        weight_grad,
        parameters=sum(_stored(leaf, moments) for leaf in params),
        activations=kept,
        output=tree_bytes(y),
      )
    )
    x = y
  return _with_ends(found)


def _with_ends(found: Sequence[LayerCost]) -> list[LayerCost]:
  """The layers, the first with the embedding and the last with the head."""
  embed, *layers, head = found
  layers[0] = _joined(embed, layers[0], layers[0])
  layers[-1] = _joined(layers[-1], head, layers[-1])
  return layers


def _joined(a: LayerCost, b: LayerCost, named: LayerCost) -> LayerCost:
  return LayerCost(
    named.name,
    a.forward + b.forward,
    a.input_grad + b.input_grad,
    a.weight_grad + b.weight_grad,
    a.parameters + b.parameters,
    a.activations + b.activations,
    named.output,
  )


def _split(
  stack: LayerStack, module: str, batch: Tree, x: Tree, keep: Policy | None
) -> tuple[LayerSplit, Tree]:
  """Splits a module; returns its slices and the shapes of what it returns.

  Args:
    stack: the `LayerStack`.
    module: its name, such as `layers/3`.
    batch: shapes of a microbatch.
    x: shapes of what the module before returned; None for the embedding.
    keep: the residual policy of a layer; None keeps everything.
  """
  spec, rows = stack.network.specs[module], leaves_of_rows(batch)[0][1].shape[0]
  batch = rows_alone(batch)
  numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
  number, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0)
  inputs = dict(batch=batch, key=key, microbatch=number, rows=numbers, state=spec.state)

  def run(params: Tree, inputs: Tree, x: Tree) -> tuple[Tree, Tree]:
    given = microbatch_inputs(inputs)
    y, after = stack.network.call(module, params, inputs["state"], x, True, given)
    return jax.tree.map(jnp.asarray, y), jax.tree.map(jnp.asarray, after)

  y, _ = jax.eval_shape(run, spec.shapes, inputs, x)
  # The embedding takes nothing but the batch.
  return split(run, spec.shapes, inputs, () if x is None else x, keep), y


def counted_costs(
  stack: LayerStack, microbatch: Tree, devices: int, residuals: str | Policy = "dots"
) -> Costs:
  """Returns durations of F, I and W of a P-th part of the layers, and of the head, by their FLOPs.

  The unit is that F. What waits for memory in place of arithmetic takes longer than this says.

  Args:
    stack: a uniform `LayerStack`.
    microbatch: shapes of one microbatch on one data shard, leaves `[rows, ...]`.
    devices: P.
    residuals: as for `pipeline_value_and_grad`.
  """
  policy, shapes = residual_policy(residuals), stack.param_shapes()
  x, rows = stack.check_shapes(microbatch), leaves_of_rows(microbatch)[0][1].shape[0]
  microbatch = rows_alone(microbatch)
  numbers = jnp.arange(rows, dtype=jnp.int32)
  key, number = jax.random.key(0), jnp.int32(0)
  inputs = LayerInputs(batch=microbatch, key=key, layer=number, microbatch=number, rows=numbers)
  state = stack.network.state_shapes()
  inputs["state"] = state["layers/0"]
  layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), shapes["layers"])

  def apply(params: Tree, inputs: Tree, x: Tree) -> tuple[Tree, Tree]:
    return stack.apply_layer(params, x, True, inputs), ()

  one = policy.traced(lambda keep: split(apply, layer, inputs, x, keep))

  def heading(params: Tree, x: Tree, batch: Tree, state: Tree) -> Any:
    return stack.apply_head(params, x, batch, state=state)

  head = jax.value_and_grad(heading, argnums=(0, 1), has_aux=True, allow_int=True)
  forward = _flops(one.forward) or 1.0
  again = 1.0 if policy.stage_input else 0.0
  # The head runs on one device, beside that device's P-th part of the layers.
  top = _flops_of(head, stack.head_params(shapes), x, microbatch, stack.head_state(state))
  top *= devices / stack.depth
  return Costs(
    1.0,
    again + _flops(one.input_grad) / forward,
    _flops(one.weight_grad) / forward,
    # A third each for the head's forward, input gradient and weight gradient.
    head=top / forward / 3,
  )


def _flops(part: Slice) -> float:
  """FLOPs of a slice."""
  return _flops_of(part, *_arguments(part))


def _flops_of(function: Callable[..., Any], *arguments: Any) -> float:
  """FLOPs of a function of these arguments, or stand-ins; 0 where XLA does not say."""
  counted = jax.jit(function).lower(*arguments).cost_analysis()
  return float(counted.get("flops", 0)) if counted else 0.0


def _seconds(part: Slice) -> float:
  """Seconds of a slice on this process's first device, the least of several runs."""
  if not part.outputs:
    return 0.0
  run = jax.jit(part).lower(*_arguments(part)).compile()
  given = [_example(leaf) for leaf in _arguments(part)]
  # Once before the clock: the first run allocates and loads.
  jax.block_until_ready(run(*given))
  times = []
  for _ in range(_REPEATS):
    began = time.perf_counter()
    jax.block_until_ready(run(*given))
    times.append(time.perf_counter() - began)
  return min(times)


def _arguments(part: Slice) -> list[jax.ShapeDtypeStruct]:
  avals: list[Any] = [v.aval for v in part.inputs]
  return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]


def _example(leaf: Any) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key(0)
  # Not zeros: some functions take other ways at zero, and logarithms give infinities.
  return jnp.full(leaf.shape, 0.5 if is_float(leaf) else 0, leaf.dtype)


def _types(tree: Tree) -> tuple[Any, ...]:
  leaves, structure = jax.tree.flatten(tree)
  return (structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))


def _stored(leaf: Any, moments: int) -> int:
  """Bytes of a parameter, its gradient's sum and its moments."""
  return int(leaf.size * (leaf.dtype.itemsize + (1 + moments) * wide(leaf.dtype).itemsize))
