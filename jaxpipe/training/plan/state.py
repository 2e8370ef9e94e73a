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

from jaxpipe.parallel.placing import map_param_trees, place, shardings, unplace
from jaxpipe.schedules import Schedule
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.plan.optimizer import widen

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
    model_state: what the stack keeps besides parameters, placed like them; empty for a stack
      without state.
  """

  params: Tree
  opt_state: Tree
  step: jax.Array
  model_state: Tree = dataclasses.field(default_factory=dict)


def state_shardings(state: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """Where each leaf of a state, or of its shapes, lies: moments lie like parameters."""
  everywhere = NamedSharding(mesh, Spec())
  place = lambda params: shardings(params, stack, schedule, mesh)  # noqa: E731
  return map_param_trees(place, state, lambda _: everywhere)


def create_state(
  stack: LayerStack,
  optimizer: optax.GradientTransformation,
  seed: int,
  example_batch: Tree,
  schedule: Schedule,
  mesh: Mesh,
  params: Tree | None = None,
) -> TrainState:
  """Returns the state before step 0; no device ever holds more than its own part of it.

  Args:
    stack, schedule, mesh: what is trained, and where.
    optimizer: from `make_optimizer`.
    seed: of the parameters.
    example_batch: a batch, or its shapes.
    params: placed parameters to begin from, which are donated; None: fresh ones.
  """
  key = jax.random.fold_in(jax.random.key(seed), _INIT)
  if params is None:
    params = stack.init(key, example_batch, schedule, mesh)
  model_state = {}
  if stack.has_state:
    model_state = stack.init_state(key, example_batch, schedule, mesh)
  fresh = _fresh(optimizer)
  # The moments are zeros made under these shardings, never sliced from a whole.
  places = state_shardings(jax.eval_shape(fresh, params, model_state), stack, schedule, mesh)
  make = jax.jit(fresh, out_shardings=places, donate_argnums=(0, 1))
  state: TrainState = make(params, model_state)
  return state


def _fresh(optimizer: optax.GradientTransformation) -> Callable[[Tree, Tree], TrainState]:
  def fresh(params: Tree, model_state: Tree) -> TrainState:
    step, moments = jnp.zeros((), jnp.int32), optimizer.init(widen(params))
    return TrainState(params=params, opt_state=moments, step=step, model_state=model_state)

  return fresh


def state_shapes(stack: LayerStack, optimizer: optax.GradientTransformation) -> TrainState:
  """The canonical state as `jax.ShapeDtypeStruct`s."""
  model_state = stack.state_shapes() if stack.has_state else {}
  shapes: TrainState = jax.eval_shape(_fresh(optimizer), stack.param_shapes(), model_state)
  return shapes


def to_canonical(state: TrainState, stack: LayerStack, schedule: Schedule) -> TrainState:
  """The state with layers in model order: parameters, moments and what the stack keeps."""
  return map_param_trees(lambda p: unplace(p, stack, schedule), state, lambda leaf: leaf)


def to_placed(state: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> TrainState:
  """Inverse of `to_canonical`."""
  return map_param_trees(lambda p: place(p, stack, schedule, mesh), state, lambda leaf: leaf)


def canonical_shardings(tree: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """Where a canonical tree lies before it is placed.

  In uniform stacks it is spread like the placed tree, which has the same shapes: what is left to do
  is to exchange layers between devices, and often nothing. Else it is whole on every device.
  """
  if stack.uniform:
    return shardings(tree, stack, schedule, mesh)
  return jax.tree.map(lambda _: NamedSharding(mesh, Spec()), tree)
