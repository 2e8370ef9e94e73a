"""The state that a training run carries from step to step, and its places on the mesh.

The optimizer's moments have the tree of the parameters. So whatever holds for parameters (their
shardings, the canonical order of a checkpoint) holds for moments, by the same functions: they are
applied to every subtree of the state that has the parts of a parameter tree.
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
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.schedules import Schedule
from jaxpipe.stack.protocol import LaidOutStack
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.plan.optimizer import widen

Tree = Any

# Each step folds its number into the key of the seed; initialisation takes one that no step has.
_INIT = 2**31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """The training state before an update.

  Attributes:
    params: parameters as placed on the mesh; canonical inside a checkpoint.
    opt_state: the optimizer's state; its moments lie like `params`.
    step: int32 [], number of updates that have been done.
    model_state: variables of the stack that are not trained, such as moving averages, placed like
      parameters; empty for a stack that has none.
  """

  params: Tree
  opt_state: Tree
  step: jax.Array
  model_state: Tree = dataclasses.field(default_factory=dict)


def state_shardings(state: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """Returns the sharding of each leaf of a state: moments lie like parameters, scalars everywhere.

  Args:
    state: a state or its shapes, as placed on the mesh.
    stack, schedule, mesh: what is trained, in which order, and where.
  """
  everywhere = NamedSharding(mesh, Spec())

  def like_params(tree: Tree) -> Tree:
    return shardings(tree, stack, schedule, mesh)

  return map_param_trees(like_params, state, lambda _: everywhere)


def create_state(
  stack: LayerStack,
  optimizer: optax.GradientTransformation,
  seed: int,
  example_batch: Tree,
  schedule: Schedule,
  mesh: Mesh,
  values: Callable[[jax.Array], tuple[Tree, Tree] | None] = lambda key: None,
) -> TrainState:
  """Returns the state before step 0; no device ever holds more than its own part of it.

  Args:
    stack: the model.
    optimizer: from `make_optimizer`.
    seed: of fresh parameters.
    example_batch: a batch, or its shapes.
    schedule, mesh: they decide where the state lies.
    values: given the key of fresh values, returns the placed parameters and model state to begin
      from, which are donated; None: fresh ones.
  """
  key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _INIT)
  begun = values(key)
  if begun is None:
    state = stack.init_state(key, example_batch, schedule, mesh) if stack.has_state else {}
    begun = stack.init(key, example_batch, schedule, mesh), state
  fresh = _fresh(optimizer)
  # The moments are zeros made under these shardings, never sliced from a whole.
  places = state_shardings(jax.eval_shape(fresh, *begun), stack, schedule, mesh)
  make = jax.jit(fresh, out_shardings=places, donate_argnums=(0, 1))
  made: TrainState = make(*begun)
  return made


def _fresh(optimizer: optax.GradientTransformation) -> Callable[[Tree, Tree], TrainState]:
  """Returns `(params, model_state) -> TrainState`, the state before the first update."""

  def fresh(params: Tree, model_state: Tree) -> TrainState:
    step, moments = jnp.zeros((), jnp.int32), optimizer.init(widen(params))
    return TrainState(params=params, opt_state=moments, step=step, model_state=model_state)

  return fresh


def state_shapes(stack: LaidOutStack, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the canonical state as `jax.ShapeDtypeStruct`s."""
  model_state = stack.state_shapes() if stack.has_state else {}
  shapes: TrainState = jax.eval_shape(_fresh(optimizer), stack.param_shapes(), model_state)
  return shapes


def to_canonical(state: TrainState, stack: LayerStack, schedule: Schedule) -> TrainState:
  """Reorders a placed state to the canonical one: layers in model order, nothing packed."""
  return map_param_trees(lambda p: unplace(p, stack, schedule), state, lambda leaf: leaf)


def to_placed(state: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> TrainState:
  """Places a canonical state on the mesh; the inverse of `to_canonical`."""
  return map_param_trees(lambda p: place(p, stack, schedule, mesh), state, lambda leaf: leaf)


def canonical_shardings(tree: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """Returns shardings for a canonical tree that is about to be placed.

  In uniform stacks the tree is spread like the placed one, which has the same shapes: what is left
  to do is to exchange layers between devices, and often nothing. Otherwise it is whole on every
  device.

  Args:
    tree: canonical parameters, moments or model state, or their shapes.
    stack, schedule, mesh: where the tree will lie.
  """
  if mode_of(stack).looped:
    return shardings(tree, stack, schedule, mesh)
  return jax.tree.map(lambda _: NamedSharding(mesh, Spec()), tree)
