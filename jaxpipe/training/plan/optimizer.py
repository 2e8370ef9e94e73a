"""The optimizer of a run, by its flags, as an optax chain on the parameters of a stack.

    clipping -> noise -> direction (Adam, Lion, ...) -> decoupled decay -> trust ratio -> rate

`make_optimizer` is the chain itself, `placed_optimizer` the same for parameters on a mesh. What
looks at whole matrices (Adafactor, LAMB, Muon) goes through `by_variable` there, all else works on
placed arrays as it is.

References:
  Clipping by the global norm: Pascanu et al., arXiv:1211.5063.
  Noise: Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks,
  arXiv:1511.06807.
  Decoupled decay: Loshchilov & Hutter, arXiv:1711.05101. Lion: Chen et al., arXiv:2302.06675.
  Adafactor: Shazeer & Stern, arXiv:1804.04235. LAMB: You et al., arXiv:1904.00962. Muon: Jordan et
  al., 2024, its updates scaled to AdamW's size as in Liu et al., arXiv:2502.16982.
  Rates that stay and then fall (wsd): Hu et al., MiniCPM, arXiv:2404.06395.
  Rates, decays and epsilons by parameter: CompleteP, see `jaxpipe.models.transformer.completep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxpipe.models.transformer.completep import CompleteP, Factors
from jaxpipe.parallel.flat import Flat
from jaxpipe.parallel.placing import layer_order
from jaxpipe.parallel.rules import describe
from jaxpipe.pipeline.update.by_variable import by_variable
from jaxpipe.schedules import Schedule
from jaxpipe.stack.protocol import is_packed
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.flags.run_config import RunConfig

Tree = Any

# Folded into the seed of the noise, which so differs from all other draws of a run.
_NOISE = 2**31 + 1
_GAMMA = 0.55  # how the noise's variance falls with the steps; the paper's


def learning_rate(config: RunConfig) -> optax.Schedule:
  """Returns the schedule `step -> learning rate`: linear warm-up, then the shape that flags name.

  The first update (step 0) already moves parameters: it takes the rate of one warm-up step, not 0.

  Args:
    config: peak rate, its shape, its share at the end, and numbers of steps.
  """
  peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
  later = _after_warmup(config, peak, max(config.steps - warmup, 1))
  if not warmup:
    return later

  def ramp(step: Any) -> Any:
    return peak * (step + 1) / warmup

  return optax.join_schedules([ramp, later], [warmup])


def _after_warmup(config: RunConfig, peak: float, steps: int) -> optax.Schedule:
  """The rate of so many steps after the warm-up."""
  final = config.final_rate
  if config.rate == "constant":
    return optax.constant_schedule(peak)
  if config.rate == "linear":
    return optax.linear_schedule(peak, final * peak, steps)
  if config.rate == "wsd":
    falling = min(config.decay_steps or max(steps // 10, 1), steps)
    falls = optax.linear_schedule(peak, final * peak, falling)
    return optax.join_schedules([optax.constant_schedule(peak), falls], [steps - falling])
  return optax.cosine_decay_schedule(peak, steps, alpha=final)


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
  """Returns the optimizer of a run for parameters that are not placed, without noise.

  Its moments have the dtype of the parameters that `init` is given: `widen` these first. What looks
  at whole matrices wants a tree with one leaf per variable, and `mask=matrices`.

  Args:
    config: the optimizer, rates and their schedule, and rules that differ by parameter (CompleteP).
    mask: `params -> tree` that says what decays; the default is for a canonical tree.
  """
  return optax.chain(_clip(config), *_steps(config, mask))


def placed_optimizer(
  config: RunConfig, stack: LayerStack, schedule: Schedule, mesh: Mesh
) -> optax.GradientTransformation:
  """Returns the optimizer of a run for parameters as they are placed; see `make_optimizer`.

  Args:
    config: the flags.
    stack, schedule, mesh: what is trained, in which order, and where.
  """
  noise = [_noise(config, stack, schedule)] if config.gradient_noise else []
  if config.optimizer not in _WHOLE:
    mask = placed_mask(stack, schedule)
    return optax.chain(_clip(config), *noise, *_steps(config, mask))
  steps = optax.chain(*_steps(config, matrices))
  return optax.chain(_clip(config), *noise, by_variable(steps, stack, schedule, mesh))


def _clip(config: RunConfig) -> optax.GradientTransformation:
  """Clipping by the global norm, which is the same whatever arrays the gradients lie in."""
  return optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()


def _steps(
  config: RunConfig, mask: Callable[[Tree], Tree]
) -> Iterator[optax.GradientTransformation]:
  """Yields what follows clipping and noise: direction, decay, trust ratio, rate."""
  beta1, beta2, epsilon = config.moments()
  directions: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(beta1, beta2, epsilon),
    "nadamw": lambda: optax.scale_by_adam(beta1, beta2, epsilon, nesterov=True),
    "adam": lambda: optax.scale_by_adam(beta1, beta2, epsilon),
    "sgd": lambda: optax.trace(beta1) if beta1 else optax.identity(),
    "lion": lambda: optax.scale_by_lion(beta1, beta2),
    "rmsprop": lambda: optax.scale_by_rms(beta2, epsilon),
    "adafactor": _adafactor,
    "lamb": lambda: optax.scale_by_adam(beta1, beta2, epsilon),
    "muon": lambda: _muon(beta1, beta2, epsilon),
  }
  direction = directions[config.optimizer]()
  rules = config.completep()
  # Decay comes after the direction and before the rate: decoupled from the gradient, scaled by the
  # rate.
  if rules:
    yield from _by_parameter(direction, config.weight_decay, rules)
  else:
    yield direction
    yield decayed(config.weight_decay, mask)
  if config.optimizer == "lamb":
    yield optax.scale_by_trust_ratio()
  yield optax.scale_by_learning_rate(learning_rate(config))


# Directions that look at whole matrices, and not at each element by itself.
_WHOLE = ("adafactor", "lamb", "muon")


def matrices(params: Tree) -> Tree:
  """Says of a tree with one leaf per variable what decays: matrices and tables."""
  return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _adafactor() -> optax.GradientTransformation:
  """Adafactor's direction without a first moment: `optax.adafactor` less rate, decay and sign."""
  return optax.chain(
    optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
  )


def _muon(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
  """Muon for the matrices of layers; AdamW's direction for all else, tables and experts among it.

  Args:
    beta1: momentum of matrices; AdamW's own is 0.9.
    beta2, epsilon: of both.
  """

  def dims(params: Tree) -> Tree:
    def one(path: Any, leaf: Any) -> Any:
      inner = path[0].key == "layers" and leaf.ndim == 2
      return optax.contrib.MuonDimensionNumbers() if inner else None

    return jax.tree.map_with_path(one, params)

  # A rate of -1 undoes the sign that optax gives with the rate, which comes later here. Updates of
  # the size of AdamW's, so that its rates and decays fit.
  return optax.contrib.muon(
    -1.0,
    beta=beta1,
    eps=epsilon,
    adam_b1=0.9,
    adam_b2=beta2,
    muon_weight_dimension_numbers=dims,
    consistent_rms=0.2,
  )


class _NoiseState(NamedTuple):
  """Number of updates so far, int32 []."""

  step: jax.Array


def _noise(
  config: RunConfig, stack: LayerStack, schedule: Schedule
) -> optax.GradientTransformation:
  """Adds normal values to placed gradients, of the variance `eta / (1 + step)^0.55`.

  A layer's values depend on its number and not on where it lies.

  Raises:
    ConfigError: layers that are not alike. Their stages lie in rows, whose values would depend on
      where the stack is cut.
  """
  if is_packed(stack.laid_out(schedule)):
    raise ConfigError(
      f"{config.flag('gradient_noise')}: is for layers of one kind, and the stack's are not alike;"
      " leave it out"
    )
  order = layer_order(stack.depth, schedule)

  def update(updates: Tree, state: _NoiseState, params: Tree = None) -> tuple[Tree, _NoiseState]:
    deviation = jnp.sqrt(config.gradient_noise / (1.0 + state.step) ** _GAMMA)
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), _NOISE)
    key = jax.random.fold_in(key, state.step)

    def one(path: Any, update: jax.Array, number: int) -> jax.Array:
      own = jax.random.fold_in(key, number)
      if path[0].key == "layers":
        shared = describe(path) in stack.shared_rows
        rows = np.arange(len(update)) if shared else order
        keys = jax.vmap(lambda row: jax.random.fold_in(own, row))(rows)
        shape = update.shape[1:]
        drawn = jax.vmap(lambda key: jax.random.normal(key, shape, update.dtype))(keys)
      else:
        drawn = jax.random.normal(own, update.shape, update.dtype)
      return update + deviation.astype(update.dtype) * drawn

    leaves, structure = jax.tree.flatten(updates)
    numbers = jax.tree.unflatten(structure, range(len(leaves)))
    noisy = jax.tree.map_with_path(one, updates, numbers)
    return noisy, _NoiseState(state.step + 1)

  return optax.GradientTransformation(lambda _: _NoiseState(jnp.zeros((), jnp.int32)), update)


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
