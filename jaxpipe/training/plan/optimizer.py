"""AdamW with warm-up, cosine and clipping, over the parameter tree of a stack.

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
import optax

from jaxpipe.models.transformer.completep import CompleteP, Factors
from jaxpipe.parallel.placing import arranged
from jaxpipe.parallel.rules import describe
from jaxpipe.schedules import Schedule
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.flags.run_config import RunConfig

Tree = Any

_FINAL_SHARE = 0.1  # of the peak learning rate, approached at the last step
_B1, _B2, _EPSILON = 0.9, 0.95, 1e-8  # GPT-3's (arXiv:2005.14165, appendix B)


def learning_rate(config: RunConfig) -> optax.Schedule:
  """Returns `step -> learning rate`: linear from 0 exclusive, then a cosine to a tenth.

  The first update (step 0) already moves: it takes the rate of one warm-up step, not 0.
  """
  peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
  cosine = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), alpha=_FINAL_SHARE)
  if not warmup:
    return cosine
  ramp = lambda step: peak * (step + 1) / warmup  # noqa: E731
  return optax.join_schedules([ramp, cosine], [warmup])


def decay_mask(params: Tree) -> Tree:
  """Says per leaf whether weight decay applies: to matrices and tables, not to scales or biases.

  Args:
    params: a parameter tree `{"embed", "layers", "head"}`, or its shapes.
  """

  def is_matrix(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    # Layers are stacked: their leaves have one dim more, and a norm's scale looks like a matrix.
    return leaf.ndim - (path[0].key == "layers") >= 2

  return jax.tree.map_with_path(is_matrix, params)


def placed_mask(stack: LayerStack, schedule: Schedule) -> Callable[[Tree], Tree]:
  """`decay_mask` of parameters as they are placed: of packed ones, a mask of every element."""
  if stack.uniform:
    return decay_mask

  def mask(_: Tree) -> Tree:
    shapes = stack.param_shapes()
    full = jax.tree.map(lambda leaf, yes: jnp.full(leaf.shape, yes), shapes, decay_mask(shapes))
    return arranged(full, stack, schedule)

  return mask


def decayed(weight_decay: float, mask: Callable[[Tree], Tree]) -> optax.GradientTransformation:
  """Adds decoupled weight decay where the mask says so, leaf by leaf or element by element."""

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
  """Returns the optimizer of a run.

  Its moments have the dtype of what it is given: `widen` parameters first.

  Args:
    config: of the run.
    mask: what decays, of parameters as they are placed.
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
  """Yields AdamW with a rate, a decay and an epsilon of each parameter's own."""

  def each(fn: Callable[[Factors, jax.Array, jax.Array], jax.Array]) -> Any:
    def one(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
      name = describe(path)
      return fn(rules.factors(name, update.ndim - name.startswith("layers/")), update, param)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates, params))

  # Adam does not see the scale of what it is given, but by its epsilon: a gradient that is k times
  # as large has one that is k times as small.
  yield each(lambda f, update, _: update / f.epsilon)
  yield adam
  yield each(lambda f, update, param: f.rate * (update + f.decay * weight_decay * param))


def widen(params: Tree) -> Tree:
  """The same tree in float32 at least: bfloat16 moments would lose most small updates."""
  return jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)
