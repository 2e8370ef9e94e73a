"""The optimizer of a run: AdamW with warm-up, cosine decay and clipping, as an optax chain.

It works on the parameter tree of a stack, canonical or as placed on the mesh.

References:
  AdamW: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
  Clipping by the global norm: Pascanu et al., arXiv:1211.5063.
  Rates, decays and epsilons by parameter: CompleteP, see `jaxpipe.models.transformer.completep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpipe.models.transformer.completep import CompleteP, Factors
from jaxpipe.parallel.flat import Flat
from jaxpipe.parallel.placing import layer_order
from jaxpipe.parallel.rules import describe
from jaxpipe.schedules import Schedule
from jaxpipe.stack.protocol import is_packed
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.flags.run_config import RunConfig

Tree = Any

_FINAL_SHARE = 0.1  # of the peak learning rate, approached at the last step
_B1, _B2, _EPSILON = 0.9, 0.95, 1e-8  # GPT-3's (arXiv:2005.14165, appendix B)


def learning_rate(config: RunConfig) -> optax.Schedule:
  """Returns the schedule `step -> learning rate`: linear warm-up, then a cosine to a tenth.

  The first update (step 0) already moves parameters: it takes the rate of one warm-up step, not 0.

  Args:
    config: peak rate, and numbers of warm-up steps and of all steps.
  """
  peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
  cosine = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), alpha=_FINAL_SHARE)
  if not warmup:
    return cosine

  def ramp(step: Any) -> Any:
    return peak * (step + 1) / warmup

  return optax.join_schedules([ramp, cosine], [warmup])


def decay_mask(params: Tree) -> Tree:
  """Says per leaf whether weight decay applies: to matrices and tables, not to scales or biases.

  Args:
    params: a tree `{"embed", "layers", "head"}` with a leaf for every parameter, or its shapes.

  Returns:
    A tree of bools.
  """

  def is_matrix(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    # Layers are stacked: their leaves have one dim more, and a norm's scale looks like a matrix.
    return leaf.ndim - (path[0].key == "layers") >= 2

  return jax.tree.map_with_path(is_matrix, params)


def placed_mask(stack: LayerStack, schedule: Schedule) -> Callable[[Tree], Tree]:
  """Returns `decay_mask` for parameters as they are placed on the mesh.

  Returns:
    `mask(params)`. Where layers are alike, placed parameters have a leaf for every parameter, and
    the mask a bool. Unlike layers are packed, many parameters into one array, and the mask is a
    bool array of the same shape. It is computed from the bounds of the parameters: in a compiled
    program it is part of what reads it, and nothing of its size is held.
  """
  laid = stack.laid_out(schedule)
  if not is_packed(laid):
    return decay_mask
  order = layer_order(laid.depth, schedule)
  bounds = {name: _bounds([_decaying(laid.params[s], name) for s in order]) for name in laid.widths}

  def mask(params: Tree) -> Tree:
    rows = {name: _inside(leaf.shape, bounds[name]) for name, leaf in params["layers"].items()}
    return {**params, "layers": rows}

  return mask


def _decaying(flat: Flat, dtype: str) -> list[int]:
  """Where stretches of a row that decay begin and end in turn, as few as can be.

  Args:
    flat: how the row is laid out.
    dtype: whose buffer it is.
  """
  spans = sorted(
    (offset, offset + leaf.size, len(leaf.shape) >= 2)
    for leaf, offset in zip(flat.leaves, flat.offsets, strict=True)
    if str(leaf.dtype) == dtype
  )
  found: list[int] = []
  before = False
  for begin, end, decays in spans:
    # Between two that decay lie zeros at most, which may as well.
    if decays and before:
      found[-1] = end
    elif decays:
      found += [begin, end]
    before = decays
  return found


def _bounds(rows: list[list[int]]) -> np.ndarray:
  """Bounds of all rows as one array, int32 [S, n], filled up with a bound that nothing reaches."""
  n = max(map(len, rows))
  return np.array([row + [np.iinfo(np.int32).max] * (n - len(row)) for row in rows], np.int32)


def _inside(shape: tuple[int, ...], bounds: np.ndarray) -> jax.Array:
  """Which elements of rows lie between a bound of an even number and the next, bool [S, width]."""
  at = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  inside = jnp.zeros(shape, bool)
  for n in range(bounds.shape[1]):
    inside ^= at >= jnp.asarray(bounds[:, n : n + 1])
  return inside


def decayed(weight_decay: float, mask: Callable[[Tree], Tree]) -> optax.GradientTransformation:
  """Returns the transformation that adds decoupled weight decay to updates.

  Args:
    weight_decay: times the parameters is what it adds.
    mask: `params -> tree` that says where, by a bool for a leaf or a bool array for its elements.
  """

  def one(update: jax.Array, param: jax.Array, where: Any) -> jax.Array:
    if isinstance(where, bool):
      return update + weight_decay * param if where else update
    return jnp.where(where, update + weight_decay * param, update)

  def update(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
    return jax.tree.map(one, updates, params, mask(params)), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def make_optimizer(
  config: RunConfig, mask: Callable[[Tree], Tree] = decay_mask
) -> optax.GradientTransformation:
  """Returns the optimizer of a run: clipping, Adam, weight decay and learning rate.

  Its moments have the dtype of the parameters that `init` is given: `widen` these first.

  Args:
    config: rates and their schedule, and rules that differ by parameter (CompleteP).
    mask: `params -> tree` that says what decays, of parameters as they are placed.
  """
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  adam = optax.scale_by_adam(_B1, _B2, _EPSILON)
  rate = optax.scale_by_learning_rate(learning_rate(config))
  # Decay comes after Adam and before the rate: decoupled from the gradient, scaled by the rate.
  if rules := config.completep():
    return optax.chain(clip, *_by_parameter(adam, config.weight_decay, rules), rate)
  return optax.chain(clip, adam, decayed(config.weight_decay, mask), rate)


def _by_parameter(
  adam: optax.GradientTransformation, weight_decay: float, rules: CompleteP
) -> Iterator[optax.GradientTransformation]:
  """Yields the transformations of AdamW with each parameter's own rate, decay and epsilon."""

  def each(fn: Callable[[Factors, jax.Array, jax.Array], jax.Array]) -> Any:
    def one(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
      name = describe(path)
      return fn(rules.factors(name, update.ndim - name.startswith("layers/")), update, param)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates, params))

  # Adam divides by the gradient's own scale, plus epsilon: a gradient that is k times as large is
  # one whose epsilon is k times as small.
  yield each(lambda f, update, _: update / f.epsilon)
  yield adam
  yield each(lambda f, update, param: f.rate * (update + f.decay * weight_decay * param))


def widen(params: Tree) -> Tree:
  """Casts parameters to float32 at least: moments in bfloat16 would lose most small updates."""
  return jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)
