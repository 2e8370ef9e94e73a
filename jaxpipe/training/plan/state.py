"""The state that a training run carries from step to step, and its places on the mesh.

Moments that have the tree of the parameters lie as parameters do: whatever holds for these (their
shardings, the canonical order of a checkpoint) holds for moments, by the same functions, applied to
every subtree of the state that has the parts of a parameter tree. An optimizer that works variable
by variable keeps `Slots` instead; in a checkpoint these have one leaf per variable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.placing import map_param_trees, place, shardings, unplace
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.pipeline.update.slots import StateLayouts, is_part, is_slots
from jaxpipe.pipeline.update.variables import Variables
from jaxpipe.schedules import Schedule
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
    average: moving average of the parameters in float32 at least, which lies like them; empty for a
      run that keeps none.
  """

  params: Tree
  opt_state: Tree
  step: jax.Array
  model_state: Tree = dataclasses.field(default_factory=dict)
  average: Tree = dataclasses.field(default_factory=dict)

  @property
  def validation_params(self) -> Tree:
    """Placed parameters to validate with: their moving average where there is one."""
    if not self.average:
      return self.params
    return jax.tree.map(lambda mean, p: mean.astype(p.dtype), self.average, self.params)


def state_shardings(state: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """Returns the sharding of each leaf of a state: moments lie like parameters, scalars everywhere.

  Args:
    state: a state or its shapes, as placed on the mesh.
    stack, schedule, mesh: what is trained, in which order, and where.
  """
  everywhere = NamedSharding(mesh, Spec())

  def one(node: Any) -> Any:
    if is_slots(node):
      specs = _layouts(stack, schedule, mesh).of(node).specs
      places = {name: NamedSharding(mesh, specs[name]) for name in node.arrays}
      return dataclasses.replace(node, arrays=places)
    return shardings(node, stack, schedule, mesh) if is_part(node) else everywhere

  return jax.tree.map(one, state, is_leaf=lambda node: is_slots(node) or is_part(node))


# Laying out the state of a large model takes a while, and it is asked for several times.
@functools.lru_cache(maxsize=4)
def _layouts(stack: LayerStack, schedule: Schedule, mesh: Mesh) -> StateLayouts:
  """Where an optimizer's state by variable lies."""
  return StateLayouts(Variables.of(stack, schedule, mesh))


def create_state(
  stack: LayerStack,
  optimizer: optax.GradientTransformation,
  seed: int,
  example_batch: Tree,
  schedule: Schedule,
  mesh: Mesh,
  *,
  averages: bool = False,
  values: Callable[[jax.Array], tuple[Tree, Tree] | None] = lambda key: None,
) -> TrainState:
  """Returns the state before step 0; no device ever holds more than its own part of it.

  Args:
    stack: the model.
    optimizer: from `placed_optimizer`.
    seed: of fresh parameters.
    example_batch: a batch, or its shapes.
    schedule, mesh: they decide where the state lies.
    averages: whether a moving average of the parameters is kept.
    values: given the key of fresh values, returns the placed parameters and model state to begin
      from, which are donated; None: fresh ones.
  """
  key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _INIT)
  begun = values(key)
  if begun is None:
    state = stack.init_state(key, example_batch, schedule, mesh) if stack.has_state else {}
    begun = stack.init(key, example_batch, schedule, mesh), state
  fresh = _fresh(optimizer, averages)
  # The moments are zeros made under these shardings, never sliced from a whole.
  places = state_shardings(jax.eval_shape(fresh, *begun), stack, schedule, mesh)
  make = jax.jit(fresh, out_shardings=places, donate_argnums=(0, 1))
  made: TrainState = make(*begun)
  return made


def _fresh(
  optimizer: optax.GradientTransformation, averages: bool
) -> Callable[[Tree, Tree], TrainState]:
  """Returns `(params, model_state) -> TrainState`, the state before the first update."""

  def fresh(params: Tree, model_state: Tree) -> TrainState:
    wide = widen(params)
    return TrainState(
      params=params,
      opt_state=optimizer.init(wide),
      step=jnp.zeros((), jnp.int32),
      model_state=model_state,
      average=wide if averages else {},
    )

  return fresh


def state_shapes(
  stack: LayerStack,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  *,
  averages: bool = False,
) -> TrainState:
  """Returns the placed state as `jax.ShapeDtypeStruct`s.

  Args:
    stack, schedule: what is trained, in which order.
    optimizer: for parameters as they are placed.
    averages: whether a moving average of the parameters is kept.
  """
  laid = stack.laid_out(schedule)
  model_state = laid.state_shapes() if laid.has_state else {}
  fresh = _fresh(optimizer, averages)
  shapes: TrainState = jax.eval_shape(fresh, laid.param_shapes(), model_state)
  return shapes


def to_canonical(
  state: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh
) -> TrainState:
  """Reorders a placed state to the canonical one: layers in model order, nothing packed."""
  layouts = _layouts(stack, schedule, mesh)
  canonical: TrainState = layouts.unplace(state, lambda tree: unplace(tree, stack, schedule))
  return canonical


def canonical_shapes(
  shapes: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh
) -> TrainState:
  """The shapes of the canonical state, of those of a placed one from `state_shapes`."""
  canonical: TrainState = jax.eval_shape(
    lambda state: to_canonical(state, stack, schedule, mesh), shapes
  )
  return canonical


def to_placed(state: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> TrainState:
  """Places a canonical state on the mesh; the inverse of `to_canonical`."""
  layouts = _layouts(stack, schedule, mesh)
  placed: TrainState = layouts.place(state, lambda tree: place(tree, stack, schedule, mesh))
  return placed


def canonical_shardings(
  state: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh
) -> TrainState:
  """Returns shardings for a canonical state that is about to be placed.

  In uniform stacks trees of parameters are spread like the placed ones, which have the same shapes:
  what is left to do is to exchange layers between devices, and often nothing. All else is whole on
  every device.

  Args:
    state: canonical, or its shapes.
    stack, schedule, mesh: where it will lie.
  """
  everywhere, layouts = NamedSharding(mesh, Spec()), _layouts(stack, schedule, mesh)

  def one(tree: Tree) -> Tree:
    if mode_of(stack).looped and not layouts.is_by_leaf(tree):
      return shardings(tree, stack, schedule, mesh)
    return jax.tree.map(lambda _: everywhere, tree)

  spread: TrainState = map_param_trees(one, state, lambda _: everywhere)
  return spread
