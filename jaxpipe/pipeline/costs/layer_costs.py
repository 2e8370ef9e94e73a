"""What each layer of a stack costs, counted or measured, for the partitioner.

A layer's forward, input gradient and weight gradient are the slices that the pipeline would run.
Counted, their costs are FLOPs, as XLA counts them before it optimizes; measured, seconds on this
process's first device, the least of several runs. The embedding counts with the first layer and the
head with the last, for they are always in one stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.residuals import AUTO, Policy, residual_policy
from jaxpipe.pipeline.layer.slices import LayerSplit, Slice
from jaxpipe.pipeline.layer.split import split
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.schedules.partition.layer import LayerCost

Tree = Any
# What a slice costs.
Price = Callable[[Slice], float]

_REPEATS = 5


def layer_costs(
  stack: Any,
  microbatch: Tree,
  *,
  measured: bool = False,
  residuals: str | Policy = AUTO,
  moments: int = 2,
) -> list[LayerCost]:
  """Costs of the layers, in model order.

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
  policy = residual_policy(residuals, stack.uniform)
  price: Price = _seconds if measured else _flops
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), microbatch)
  seen: list[tuple[Any, Any, tuple[float, float, float]]] = []
  x, found = None, []
  for module, spec in stack.network.specs.items():
    cut, y = _cut(stack, module, shapes, x, policy.layer if not policy.stage_input else None)
    known = (prices for one, was, prices in seen if one.same_kind(spec) and was == _types(x))
    prices = next(known, None)
    if prices is None:
      prices = price(cut.forward), price(cut.input_grad), price(cut.weight_grad)
      seen.append((spec, _types(x), prices))
    forward, input_grad, weight_grad = prices
    again = forward if policy.stage_input else 0.0
    kept = 0 if policy.stage_input else sum(_bytes(saved) for saved in cut.saved)
    params = jax.tree.leaves(stack.network.own(module, spec.shapes))
    found.append(
      LayerCost(
        f"{spec.name} {spec.kind.__name__}",
        forward,
        input_grad + again,
        weight_grad,
        parameters=sum(_stored(leaf, moments) for leaf in params),
        activations=kept,
        output=sum(map(_bytes, jax.tree.leaves(y))),
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


def _cut(
  stack: Any, module: str, batch: Tree, x: Tree, keep: Policy | None
) -> tuple[LayerSplit, Tree]:
  """A module's slices, and the shapes of what it returns."""
  spec, rows = stack.network.specs[module], jax.tree.leaves(batch)[0].shape[0]
  numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
  number, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0)
  inputs = dict(batch=batch, key=key, microbatch=number, rows=numbers, state=spec.state)

  def run(params: Tree, inputs: Tree, x: Tree) -> tuple[Tree, Tree]:
    rest = {**{name: value for name, value in inputs.items() if name != "state"}, "layer": 0}
    y, after = stack.network.call(module, params, inputs["state"], x, True, rest)
    return jax.tree.map(jnp.asarray, y), jax.tree.map(jnp.asarray, after)

  y, _ = jax.eval_shape(run, spec.shapes, inputs, x)
  # The embedding takes nothing but the batch.
  return split(run, spec.shapes, inputs, () if x is None else x, keep), y


def _flops(part: Slice) -> float:
  counted = jax.jit(part).lower(*_arguments(part)).cost_analysis()
  return float(counted.get("flops", 0)) if counted else 0.0


def _seconds(part: Slice) -> float:
  if not part.outputs:
    return 0.0
  run = jax.jit(part).lower(*_arguments(part)).compile()
  given = [_example(leaf) for leaf in _arguments(part)]
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
  return jnp.full(leaf.shape, 0.5 if is_float(leaf) else 0, leaf.dtype)


def _types(tree: Tree) -> tuple[Any, ...]:
  leaves, structure = jax.tree.flatten(tree)
  return (structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))


def _stored(leaf: Any, moments: int) -> int:
  """Bytes of a parameter, its gradient's sum and its moments."""
  return int(leaf.size * (leaf.dtype.itemsize + (1 + moments) * wide(leaf.dtype).itemsize))


def _bytes(leaf: Any) -> int:
  size = 1
  for n in leaf.shape:
    size *= n
  return int(size * jnp.dtype(leaf.dtype).itemsize)
