"""What a training run carries from step to step, and where each part of it lies.

The optimizer's moments have the tree of the parameters, so whatever holds for parameters (their
places on the mesh, the canonical order of a checkpoint) holds for them by the same functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.models.stack import LayerStack
from jaxpipe.parallel.placing import map_param_trees, place, shardings, unplace
from jaxpipe.schedules import Schedule
from jaxpipe.training.optimizer import widen

Tree = Any

# Steps fold small numbers into the same key; initialisation takes one that no step reaches.
_INIT = 2**31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """The state before step `step`.

  Attributes:
    params: as placed on the mesh; canonical inside a checkpoint.
    opt_state: the optimizer's; its moments lie like `params`.
    step: int32 [], updates done.
    model_state: what the stack keeps besides parameters, canonical and the same on all devices;
      empty for a stack without state.
  """

  params: Tree
  opt_state: Tree
  step: jax.Array
  model_state: Tree = dataclasses.field(default_factory=dict)


def state_shardings(state: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """Where each leaf of a state, or of its shapes, lies: moments lie like parameters."""
  everywhere = NamedSharding(mesh, Spec())
  place = lambda params: shardings(params, stack, schedule, mesh)  # noqa: E731
  return map_params(place, state, lambda _: everywhere)


def create_state(
  stack: LayerStack,
  optimizer: optax.GradientTransformation,
  seed: int,
  example_batch: Tree,
  schedule: Schedule,
  mesh: Mesh,
) -> TrainState:
  """Returns the state before step 0; no device ever holds more than its own part of it.

  Args:
    stack, schedule, mesh: what is trained, and where.
    optimizer: from `make_optimizer`.
    seed: of the parameters.
    example_batch: a batch, or its shapes.
  """
  key = jax.random.fold_in(jax.random.key(seed), _INIT)
  params = stack.init(key, example_batch, schedule, mesh)
  fresh = _fresh(optimizer, _model_state(stack, key, example_batch))
  # The moments are zeros made under these shardings, never sliced from a whole.
  places = state_shardings(jax.eval_shape(fresh, params), stack, schedule, mesh)
  state: TrainState = jax.jit(fresh, out_shardings=places, donate_argnums=0)(params)
  return state


def _model_state(stack: Any, key: jax.Array, example_batch: Tree) -> Tree:
  # Asked for by name, since stacks without state need not have it.
  return stack.init_state(key, example_batch) if getattr(stack, "has_state", False) else {}


def _fresh(
  optimizer: optax.GradientTransformation, model_state: Tree
) -> Callable[[Tree], TrainState]:
  def fresh(params: Tree) -> TrainState:
    step, moments = jnp.zeros((), jnp.int32), optimizer.init(widen(params))
    return TrainState(params=params, opt_state=moments, step=step, model_state=model_state)

  return fresh


def state_shapes(
  stack: LayerStack, optimizer: optax.GradientTransformation, example_batch: Tree = None
) -> TrainState:
  """The state as `jax.ShapeDtypeStruct`s; placed and canonical trees have the same.

  Args:
    stack, optimizer: of the run.
    example_batch: a batch, or its shapes; a stack without state needs none.
  """

  def whole(params: Tree) -> TrainState:
    model_state = _model_state(stack, jax.random.key(0), example_batch)
    return _fresh(optimizer, model_state)(params)

  shapes: TrainState = jax.eval_shape(whole, stack.param_shapes())
  return shapes


def map_params(
  fn: Callable[[Tree], Tree], state: TrainState, other: Callable[[Any], Any]
) -> TrainState:
  """Applies `fn` to parameters and moments, `other` to all else, the model's state included."""
  bare = dataclasses.replace(state, model_state={})
  mapped: TrainState = map_param_trees(fn, bare, other)
  return dataclasses.replace(mapped, model_state=jax.tree.map(other, state.model_state))


def to_canonical(state: TrainState, stack: LayerStack, schedule: Schedule) -> TrainState:
  """The state with layers in model order, parameters and moments alike."""
  return map_params(lambda p: unplace(p, stack, schedule), state, lambda leaf: leaf)


def to_placed(state: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> TrainState:
  """Inverse of `to_canonical`."""
  return map_params(lambda p: place(p, stack, schedule, mesh), state, lambda leaf: leaf)
