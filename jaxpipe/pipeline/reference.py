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

from jaxpipe.pipeline.batch import check_rows
from jaxpipe.pipeline.residuals import Policy, residual_policy
from jaxpipe.pipeline.rings import wide

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
    `reference(params, batch, key=None) -> ((loss, metrics), grads)`, jitted; params and grads
    canonical, everything else as for the pipeline.

  Raises:
    ValueError: an unknown policy, or paths of another number of microbatches; when it is called,
      names that no layer bears.
  """
  policy = residual_policy(residuals)
  orders = _orders(stack.depth, microbatches, paths)

  def loss_of(
    keep: Policy | None, params: Tree, batch: Tree, m: jax.Array, key: jax.Array | None
  ) -> Any:
    rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.int32)

    def layer(x: Tree, layer_params: Tree, i: jax.Array) -> Tree:
      inputs = dict(batch=batch, key=key, layer=i, microbatch=m, rows=rows)
      return stack.apply_layer(layer_params, x, True, inputs)

    kept = layer if keep is None else jax.checkpoint(layer, policy=keep)

    def layers(x: Tree, params: Tree) -> Tree:
      if paths is None:
        each = (params, jnp.arange(stack.depth))
        return lax.scan(lambda x, args: (kept(x, *args), None), x, each)[0]

      def passed(x: Tree, layer: Tree, i: jax.Array) -> Tree:
        return lax.cond(i < 0, lambda x, *_: x, kept, x, layer, i)

      order = orders[m]
      each = (jax.tree.map(lambda p: p[order], params), order)
      return lax.scan(lambda x, args: (passed(x, *args), None), x, each)[0]

    run = jax.checkpoint(layers) if policy.stage_input else layers
    y = run(stack.apply_embed(params["embed"], batch), params["layers"])
    return stack.apply_head(stack.head_params(params), y, batch)

  @jax.jit
  def reference(params: Tree, batch: Tree, key: jax.Array | None = None) -> Any:
    rows = check_rows(batch, microbatches)
    cut = jax.tree.map(lambda leaf: leaf.reshape(microbatches, rows, *leaf.shape[1:]), batch)
    first = jax.tree.map(lambda leaf: leaf[0], cut)

    def value_and_grad(keep: Policy | None) -> Callable[..., Any]:
      return jax.value_and_grad(functools.partial(loss_of, keep), has_aux=True)

    shapes = policy.traced(
      lambda keep: jax.eval_shape(value_and_grad(keep), params, first, jnp.int32(0), key)
    )
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), shapes)

    def one(sums: Tree, at: Any) -> tuple[Tree, None]:
      m, batch = at
      new = value_and_grad(policy.layer)(params, batch, m, key)
      return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new), None

    sums, _ = lax.scan(one, start, (jnp.arange(microbatches), cut))
    (loss, (weight, metrics)), grads = sums
    return (loss / weight, metrics), jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)

  return reference


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
