"""The oracle: the same loss and gradients without a pipeline, on one device, by `jax.grad`.

Nothing here is shared with the executor but the stack's own functions: no split, no tick table, no
rings. Microbatches are summed in the order 0 ... M-1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.pipeline.batch import check_rows, given_state
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.residuals import Policy, Residuals, residual_policy
from jaxpipe.pipeline.storage.rings import wide

Tree = Any


def reference_value_and_grad(
  stack: Any,
  microbatches: int,
  residuals: str | Policy = "all",
  paths: Sequence[Sequence[int]] | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Tree], Tree]]:
  """Returns the unpipelined counterpart of `pipeline_value_and_grad`.

  Args:
    stack: a `LayerStack`.
    microbatches: M; dropout masks are keyed by microbatch, so it is part of the function.
    residuals: as for the pipeline, one stage holding all layers; it changes memory and time, never
      the result.
    paths: for every microbatch, the layers that it passes, in order; default, all of them.

  Returns:
    `reference(params, batch, key=None) -> ((loss, metrics), grads)`, or with `state`, jitted; all
    trees canonical, everything else as for the pipeline.

  Raises:
    ValueError: an unknown policy, or paths of another number of microbatches; when it is called,
      names that no layer bears.
  """
  policy = residual_policy(residuals)
  orders = _orders(stack.depth, microbatches, paths)
  if stack.uniform:
    loss_of = functools.partial(_loss_of_layers_alike, stack, policy, orders, paths is None)
  else:
    loss_of = functools.partial(_loss_of_modules, stack, policy)

  @jax.jit
  def reference(
    params: Tree, batch: Tree, key: jax.Array | None = None, state: Tree | None = None
  ) -> Any:
    old = given_state(stack, state)
    rows = check_rows(batch, microbatches)
    cut = jax.tree.map(lambda leaf: leaf.reshape(microbatches, rows, *leaf.shape[1:]), batch)
    first = jax.tree.map(lambda leaf: leaf[0], cut)

    def value_and_grad(keep: Policy | None) -> Callable[..., Any]:
      return jax.value_and_grad(functools.partial(loss_of, keep), has_aux=True)

    shapes = policy.traced(
      lambda keep: jax.eval_shape(value_and_grad(keep), params, old, first, jnp.int32(0), key)
    )
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), shapes)
    (loss, (weight, metrics, states)), grads = start
    start = ((loss, (weight, metrics, jax.tree.map(_least, states))), grads)

    def one(sums: Tree, at: Any) -> tuple[Tree, None]:
      m, batch = at
      ((loss, (weight, metrics, new)), grads) = value_and_grad(policy.layer)(
        params, old, batch, m, key
      )
      ((losses, (weights, all_metrics, states)), all_grads) = sums
      add = lambda a, b: jax.tree.map(lambda a, b: a + b.astype(a.dtype), a, b)  # noqa: E731
      aux = (add(weights, weight), add(all_metrics, metrics), jax.tree.map(_count, states, new))
      return ((add(losses, loss), aux), add(all_grads, grads)), None

    sums, _ = lax.scan(one, start, (jnp.arange(microbatches), cut))
    (loss, (weight, metrics, counted)), grads = sums
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    if not old:
      return (loss / weight, metrics), grads
    mean = lambda sums, old: (sums / microbatches if is_float(old) else sums).astype(old.dtype)  # noqa: E731
    new = jax.tree.map(
      lambda changes, sums, old: mean(sums, old) if changes else old,
      stack.changing(),
      counted,
      old,
    )
    return (loss / weight, metrics, new), grads

  return reference


def _least(zeros: jax.Array) -> jax.Array:
  """What sums, or largest whole numbers, begin with."""
  return zeros if is_float(zeros) else jnp.full_like(zeros, jnp.iinfo(zeros.dtype).min)


def _count(sums: jax.Array, new: jax.Array) -> jax.Array:
  """Adds what a microbatch has made of the state; of whole numbers, the largest is kept."""
  new = new.astype(sums.dtype)
  return sums + new if is_float(new) else jnp.maximum(sums, new)


def _loss_of_layers_alike(
  stack: Any,
  policy: Residuals,
  orders: jax.Array,
  whole: bool,
  keep: Policy | None,
  params: Tree,
  state: Tree,
  batch: Tree,
  m: jax.Array,
  key: jax.Array | None,
) -> Any:
  """One microbatch's `loss_sum, (weight, metrics, state)`, by a loop over stacked layers."""
  rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.int32)

  def layer(x: Tree, layer_params: Tree, i: jax.Array) -> Tree:
    inputs = dict(batch=batch, key=key, layer=i, microbatch=m, rows=rows)
    return stack.apply_layer(layer_params, x, True, inputs)

  kept = layer if keep is None else jax.checkpoint(layer, policy=keep)

  def layers(x: Tree, params: Tree) -> Tree:
    if whole:
      each = (params, jnp.arange(stack.depth))
      return lax.scan(lambda x, args: (kept(x, *args), None), x, each)[0]

    def passed(x: Tree, layer: Tree, i: jax.Array) -> Tree:
      return lax.cond(i < 0, lambda x, *_: x, kept, x, layer, i)

    order = orders[m]
    each = (jax.tree.map(lambda p: p[order], params), order)
    return lax.scan(lambda x, args: (passed(x, *args), None), x, each)[0]

  run = jax.checkpoint(layers) if policy.stage_input else layers
  y = run(stack.apply_embed(params["embed"], batch), params["layers"])
  loss, (weight, metrics) = stack.apply_head(stack.head_params(params), y, batch)
  return loss, (weight, metrics, state)


def _loss_of_modules(
  stack: Any,
  policy: Residuals,
  keep: Policy | None,
  params: Tree,
  state: Tree,
  batch: Tree,
  m: jax.Array,
  key: jax.Array | None,
) -> Any:
  """The same by one module after the other."""
  rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.int32)
  inputs = dict(batch=batch, key=key, layer=0, microbatch=m, rows=rows)

  def modules(params: Tree, state: Tree) -> Any:
    own, old = stack.network.split(params), stack.network.split(state) if state else {}
    x: Any = None
    after: dict[str, Tree] = {}
    for module in stack.network.specs:
      run = functools.partial(stack.network.call, module, training=True, inputs=inputs)
      kept = run if keep is None else jax.checkpoint(run, policy=keep)
      x, after[module] = kept(stack.network.params_of(module, own), old.get(module, {}), x)
    loss, (weight, metrics) = x
    return loss, (weight, metrics, stack.network.join(after) if state else state)

  run = jax.checkpoint(modules) if policy.stage_input else modules
  return run(params, state)


def _orders(depth: int, microbatches: int, paths: Sequence[Sequence[int]] | None) -> jax.Array:
  """Layers of every microbatch, int32 [M, longest], short paths filled up with -1."""
  if paths is None:
    paths = [range(depth)] * microbatches
  if len(paths) != microbatches:
    raise ValueError(f"{len(paths)} paths for {microbatches} microbatches; give each one path")
  orders = np.full((microbatches, max(map(len, paths))), -1, np.int32)
  for m, path in enumerate(paths):
    orders[m, : len(path)] = path
  return jnp.asarray(orders)
