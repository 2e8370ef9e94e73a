"""Computes loss and gradients of a stack without a pipeline, on one device: the executor's oracle.

Tests and `check` compare the pipeline with this function. It shares with the executor the stack's
own functions, the residual policies, the checks of the batch and the dtypes of sums, and none of
the machinery: layers are differentiated whole, by `jax.value_and_grad`, and there is no tick table
and no ring buffer. Microbatches are summed in the order 0 ... M-1:

    loss   sum of loss_sum over the microbatches, over sum of weight
    grads  sum of the gradients of loss_sum, over sum of weight
    state  floats: mean of what each microbatch makes of the old state; whole numbers: the largest
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.pipeline.batch import given_state, look_at_draws, microbatch
from jaxpipe.pipeline.batch import microbatches as divide
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.interpret import opened
from jaxpipe.pipeline.layer.residuals import Policy, Residuals, residual_policy
from jaxpipe.pipeline.layer.weight import divisor, scale_of, uses_float16
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.stack.context import LayerInputs, MicrobatchInputs, check_key, leaves_of_rows
from jaxpipe.stack.stack import LayerStack

Tree = Any


def reference_value_and_grad(
  stack: LayerStack,
  microbatches: int,
  residuals: str | Policy = "all",
  paths: Sequence[Sequence[int]] | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Tree], Tree]]:
  """Returns the unpipelined counterpart of `pipeline_value_and_grad`.

  Args:
    stack: the network.
    microbatches: M. It is part of the function, since dropout masks are keyed by microbatch.
    residuals: as for the pipeline, with all layers in one stage. It changes memory and time, never
      the result.
    paths: for each microbatch, the numbers of the layers that it passes, in order; default, all
      layers. Only for stacks whose layers are alike.

  Returns:
    `reference(params, batch, key=None) -> ((loss, metrics), grads)`, or of a stack with model state
    `reference(params, batch, key, state) -> ((loss, metrics, state), grads)`, jitted. All trees are
    canonical; shapes, dtypes and meaning are those of the pipeline's step.

  Raises:
    ValueError: an unknown policy, or paths of another number of microbatches; when it is called,
      checkpoint names that no layer has, rows that do not divide, a state that is missing.
  """
  policy = residual_policy(residuals)
  orders = _orders(stack.depth, microbatches, paths)
  forward: Callable[..., Any]
  if paths is not None and any(jax.tree.leaves(stack.changing())):
    raise ValueError(
      "paths= lets microbatches skip layers whose statistics would be of some microbatches only;"
      " leave it out"
    )
  if stack.uniform:
    forward = functools.partial(_run_layers_alike, stack, policy, orders, paths is None)
  else:
    forward = functools.partial(_run_modules, stack, policy)

  def value_and_grad(keep: Policy | None, rows: int) -> Callable[..., Any]:
    def loss_sum(
      params: Tree, state: Tree, batch: Tree, m: jax.Array, key: Any, scale: jax.Array | None = None
    ) -> Any:
      loss, aux = forward(keep, params, state, _inputs(batch, m, key, rows))
      return loss if scale is None else loss * scale.astype(loss.dtype), (loss, aux)

    def run(*args: Any) -> Any:
      (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(*args)
      return sums, grads

    return run

  @jax.jit
  def reference(
    params: Tree, batch: Tree, key: jax.Array | None = None, state: Tree | None = None
  ) -> Any:
    old = given_state(stack, state)
    check_key(key)
    if key is not None:
      look_at_draws(stack, batch)
    divided = divide(batch, microbatches, 1)
    first, rows = microbatch(divided, 0), leaves_of_rows(divided)[0][1].shape[1]
    # Traced once for its shapes alone; on the way, the policy refuses checkpoint names to keep that
    # no layer has.
    closed, shapes = policy.traced(
      lambda keep: jax.make_jaxpr(value_and_grad(keep, rows), return_shape=True)(
        params, old, first, jnp.int32(0), key
      )
    )
    scale = None
    if uses_float16(opened(closed).eqns):

      def weigh(m: jax.Array) -> jax.Array:
        return forward(policy.layer, params, old, _inputs(microbatch(divided, m), m, key, rows))[1][
          0
        ]

      scale = scale_of(lax.map(weigh, jnp.arange(microbatches)).sum())
    # Sums are at least as precise as float32, whatever the precision of what is added.
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), shapes)
    (loss, (weight, metrics, states)), grads = start
    start = ((loss, (weight, metrics, jax.tree.map(_least, states))), grads)

    def one(sums: Tree, m: jax.Array) -> tuple[Tree, None]:
      ((loss, (weight, metrics, new)), grads) = value_and_grad(policy.layer, rows)(
        params, old, microbatch(divided, m), m, key, scale
      )
      ((losses, (weights, all_metrics, states)), all_grads) = sums
      aux = (_add(weights, weight), _add(all_metrics, metrics), jax.tree.map(_count, states, new))
      return ((_add(losses, loss), aux), _add(all_grads, grads)), None

    sums, _ = lax.scan(one, start, jnp.arange(microbatches))
    (loss, (weight, metrics, counted)), grads = sums
    # Divided once, after the sum: the weights of later microbatches are unknown to earlier ones.
    by = weight if scale is None else weight * scale
    grads = jax.tree.map(lambda g: g / divisor(by, g.dtype), grads)
    mean = loss / divisor(weight, jnp.promote_types(loss.dtype, weight.dtype))
    if not old:
      return (mean, metrics), grads
    new = jax.tree.map(
      lambda changes, sums, old: _mean(sums, old, microbatches) if changes else old,
      stack.changing(),
      counted,
      old,
    )
    return (mean, metrics, new), grads

  return reference


def _add(sums: Tree, new: Tree) -> Tree:
  """Adds leaf by leaf, in the sums' own precision."""
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new)


def _least(zeros: jax.Array) -> jax.Array:
  """The value that `_count` begins with: 0 for a sum, the least integer for a maximum."""
  return zeros if is_float(zeros) else jnp.full_like(zeros, jnp.iinfo(zeros.dtype).min)


def _count(sums: jax.Array, new: jax.Array) -> jax.Array:
  """Adds a leaf of the state after a microbatch to its sum; of integers, keeps the larger one."""
  new = new.astype(sums.dtype)
  return sums + new if is_float(new) else jnp.maximum(sums, new)


def _mean(sums: jax.Array, old: jax.Array, microbatches: int) -> jax.Array:
  """A leaf of the new state: the mean of M floats, or the largest integer as it is."""
  return (sums / microbatches if is_float(old) else sums).astype(old.dtype)


def _inputs(batch: Tree, m: jax.Array, key: jax.Array | None, rows: int) -> MicrobatchInputs:
  """What all modules are given of microbatch `m`, whose rows are all on this device."""
  numbers = jnp.arange(rows, dtype=jnp.int32)
  return MicrobatchInputs(batch=batch, key=key, microbatch=m, rows=numbers)


def _keeping(keep: Policy | None, run: Callable[..., Any]) -> Callable[..., Any]:
  """`run`, whose backward recomputes whatever `keep` does not say to keep; with None, nothing."""
  return run if keep is None else jax.checkpoint(run, policy=keep)


def _run_layers_alike(
  stack: LayerStack,
  policy: Residuals,
  orders: jax.Array,
  whole: bool,
  keep: Policy | None,
  params: Tree,
  state: Tree,
  inputs: MicrobatchInputs,
) -> Any:
  """Returns one microbatch's `loss_sum, (weight, metrics, state)`, by a loop over stacked layers.

  Args:
    stack: whose layers are alike.
    policy: what the backward finds kept, of the stage.
    orders: int32 [M, longest], the layers that each microbatch passes; see `_orders`.
    whole: whether every microbatch passes all layers, in their order; `orders` is not read then.
    keep: what the backward finds kept, within a layer.
    params: canonical.
    state: canonical. That of the layers is returned as they make it.
    inputs: of the microbatch.
  """

  old = state["layers"] if state else {}

  def layer(x: Tree, layer_trees: Tree, i: jax.Array) -> tuple[Tree, list[Any]]:
    layer_params, layer_state = layer_trees
    layer_inputs: LayerInputs = {**inputs, "layer": i, "state": layer_state}
    return stack.run_layer(layer_params, x, True, layer_inputs)

  kept = _keeping(keep, layer)

  def layers(x: Tree, params: Tree) -> tuple[Tree, list[Any]]:
    # Layers in their order are looped over as they lie; other paths need a gathered copy of them.
    if whole:
      each = ((params, old), jnp.arange(stack.depth))
      out: tuple[Tree, list[Any]] = lax.scan(lambda x, args: kept(x, *args), x, each)
      return out

    # Paths shorter than the longest end in -1, where x passes unchanged.
    def passed(x: Tree, layer: Tree, i: jax.Array) -> Tree:
      return lax.cond(i < 0, lambda x, *_: x, lambda *args: kept(*args)[0], x, layer, i)

    order = orders[inputs["microbatch"]]
    each = (jax.tree.map(lambda p: p[order], (params, old)), order)
    return lax.scan(lambda x, args: (passed(x, *args), None), x, each)[0], []

  # Under `full`, the backward begins with a second forward of all layers, which are one stage here.
  run = jax.checkpoint(layers) if policy.stage_input else layers
  batch = inputs["batch"]
  ends = state or {"embed": {}, "head": {}}
  x = stack.apply_embed(params["embed"], batch, state=ends["embed"])
  y, changed = run(x, stack.network.shared.repeated(params["layers"]))
  if changed:
    # As they are made: they are rounded to their own dtype once, as a mean over microbatches.
    state = {**state, "layers": stack.with_statistics(old, changed)}
  loss, (weight, metrics) = stack.apply_head(
    stack.head_params(params), y, batch, state=stack.head_state(ends)
  )
  return loss, (weight, metrics, state)


def _run_modules(
  stack: LayerStack,
  policy: Residuals,
  keep: Policy | None,
  params: Tree,
  state: Tree,
  inputs: MicrobatchInputs,
) -> Any:
  """Returns one microbatch's `loss_sum, (weight, metrics, new state)`, one module after another.

  Args:
    stack: of any layers.
    policy: what the backward finds kept, of the stage.
    keep: what the backward finds kept, within a module.
    params: canonical.
    state: canonical; empty where no module has any.
    inputs: of the microbatch.
  """

  def modules(params: Tree, state: Tree) -> Any:
    own, old = stack.network.split(params), stack.network.split(state) if state else {}
    x: Any = None
    after: dict[str, Tree] = {}
    for module in stack.network.specs:
      run = functools.partial(stack.network.call, module, training=True, inputs=inputs)
      params_of_module = stack.network.params_of(module, own)
      state_of_module = stack.network.state_of(module, old)
      x, new = _keeping(keep, run)(params_of_module, state_of_module, x)
      after[module] = stack.network.own_state(module, new)
    # The last module is the head, which returns the sums in place of another x.
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
