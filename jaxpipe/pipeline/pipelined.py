"""Pipelines a loss over a stack of layers, for users who have a training loop of their own.

`pipeline` assembles a stack, a schedule and a mesh, checks that they fit one another, and returns a
`Pipelined` with the functions that a training loop calls:

    pipe = jaxpipe.pipeline(loss, modules, batch, mesh="stage:4", schedule="1f1b")
    params = pipe.init(key, batch)
    (loss, metrics), grads = pipe.value_and_grad(params, batch, key)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import STAGE, make_mesh, row_shards
from jaxpipe.parallel.placing import place, unplace
from jaxpipe.pipeline.batch import check_rows, given_state
from jaxpipe.pipeline.check import Report, check
from jaxpipe.pipeline.executor import pipeline_forward, pipeline_value_and_grad
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.partitioned import partitioned
from jaxpipe.pipeline.update.by_variable import by_variable
from jaxpipe.pipeline.update.slots import StateLayouts, is_part
from jaxpipe.pipeline.update.variables import Variables
from jaxpipe.schedules import Schedule, make_schedule
from jaxpipe.stack.forward import modules, run_layers
from jaxpipe.stack.protocol import is_packed
from jaxpipe.stack.stack import LayerStack

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pipelined:
  """A stack, a schedule and a mesh, with the functions that train and evaluate over them.

  Trees that methods take and return are placed, as by `place`, unless the method says otherwise.

  Attributes:
    stack: the network.
    schedule: order of the actions, and which device has which stage.
    mesh: the devices, with an axis `stage` of `schedule.devices`.
    options: keyword arguments of `pipeline_value_and_grad`.
  """

  stack: LayerStack
  schedule: Schedule
  mesh: Mesh
  options: dict[str, Any]

  def __str__(self) -> str:
    """Schedule, mesh and stages in a few lines; of a packed stack, the modules of each stage."""
    sizes = ",".join(f"{axis}:{n}" for axis, n in self.mesh.shape.items() if n > 1) or "one device"
    laid = self.stack.laid_out(self.schedule)
    lines = [
      f"{self.schedule.name} of {self.schedule.microbatches} microbatches over {sizes}"
      f" ({self.schedule.stages} stages, {self.stack.depth} layers)"
    ]
    if is_packed(laid):
      specs = self.stack.network.specs
      for s, names in enumerate(laid.stages):
        lines.append(f"stage {s}: {', '.join(f'{name} {specs[name].label}' for name in names)}")
    return "\n".join(lines)

  def init(self, key: jax.Array, batch: Tree) -> Tree:
    """Returns fresh parameters, of which each device makes its own.

    Args:
      key: PRNG key of the values.
      batch: an example batch or its shapes, leaves `[B, ...]`.
    """
    return self.stack.init(key, batch, self.schedule, self.mesh)

  def init_state(self, key: jax.Array, batch: Tree) -> Tree:
    """Returns fresh model state, such as running statistics and frozen weights.

    Args:
      key: PRNG key of the values; that of `init`, for weights that belong to its parameters.
      batch: an example batch or its shapes, leaves `[B, ...]`.
    """
    return self.stack.init_state(key, batch, self.schedule, self.mesh)

  @functools.cached_property
  def value_and_grad(self) -> Callable[..., Any]:
    """A training step `(params, batch, key=None) -> ((loss, metrics), grads)`.

    With model state, `(params, batch, key, state) -> ((loss, metrics, state), grads)`. The step is
    compiled at its first call; `pipeline_value_and_grad` describes arguments and results.
    """
    return pipeline_value_and_grad(self.stack, self.schedule, self.mesh, **self.options)

  @functools.cached_property
  def evaluate(self) -> Callable[..., Any]:
    """An evaluation `(params, batch, state=None) -> (loss, metrics)`: forwards only, no dropout.

    Running statistics take the place of the batch's own; see `pipeline_forward`.
    """
    return pipeline_forward(self.stack, self.schedule, self.mesh)

  def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation of placed trees that does what `tx` does on one leaf per variable.

    See `jaxpipe.by_variable`.

    Args:
      tx: an optax transformation.
    """
    return by_variable(tx, self.stack, self.schedule, self.mesh)

  def place(self, tree: Tree) -> Tree:
    """Lays a canonical tree out over the devices.

    Args:
      tree: parameters, gradients or model state; or the state of an optax transformation, as `tx`
        makes it of one leaf per variable, or of a canonical tree.
    """
    if not jax.tree.leaves(tree):
      return tree
    if is_part(tree):
      return place(tree, self.stack, self.schedule, self.mesh)
    return self._layouts.place(tree, self.place)

  def unplace(self, tree: Tree) -> Tree:
    """Returns the canonical tree of a placed one, with its layers in model order.

    The state of `optimizer(tx)` becomes what `tx` makes of one leaf per variable.

    Args:
      tree: parameters, gradients, model state or an optimizer's state.
    """
    if not jax.tree.leaves(tree):
      return tree
    if is_part(tree):
      return unplace(tree, self.stack, self.schedule)
    return self._layouts.unplace(tree, self.unplace)

  @functools.cached_property
  def _layouts(self) -> StateLayouts:
    """How optimizer states lie on the mesh."""
    return StateLayouts(Variables.of(self.stack, self.schedule, self.mesh))

  def check(self, batch: Tree, *, optimizer: optax.GradientTransformation | None = None) -> Report:
    """Compares every gradient leaf with the unpipelined model's, for fresh parameters.

    Args:
      batch: arrays, leaves `[B, ...]`. One device must hold the whole model.
      optimizer: an optax transformation; what two updates of it by `optimizer(tx)` make of each
        variable is compared as well.
    """
    return check(self.stack, self.schedule, self.mesh, batch, optimizer=optimizer, **self.options)

  def predict(self, params: Tree, batch: Tree, state: Tree | None = None) -> Tree:
    """Returns the output of the last layer in evaluation: no dropout, norms by moving averages.

    All layers run on this process's first device, which must have memory for all of them.

    Args:
      params: placed parameters.
      batch: arrays, leaves `[B, ...]`, B of any size.
      state: placed model state, where the stack has any.

    Raises:
      ValueError: the stack has state and none is given, or the other way round.
    """
    state = given_state(self.stack, state)
    trees = self.unplace(params), self.unplace(state) if state else {}, batch
    return self._run_layers(*jax.device_put(trees, self.mesh.local_devices[0]))

  # A property of this object, so that the stack and its programs go when the object goes: as a
  # static argument of a function of the module, the stack would live as long as the process.
  @functools.cached_property
  def _run_layers(self) -> Callable[[Tree, Tree, Tree], Tree]:
    """Compiled `(canonical params, canonical state, batch) -> output of the last layer`."""
    return jax.jit(functools.partial(_predict, self.stack))


def _predict(stack: LayerStack, params: Tree, state: Tree, batch: Tree) -> Tree:
  """Runs the embedding and all layers as modules in evaluation mode, one after the other."""
  embed, *layers, _ = modules(stack, params, state)
  return run_layers(layers, embed(batch), batch)


def pipeline(
  loss: Callable[[Tree, Tree], Any] | None,
  layers: LayerStack | Sequence[Any],
  batch: Tree = None,
  *,
  mesh: str | Mesh = "stage:4",
  schedule: str | Schedule = "1f1b",
  microbatches: int = 8,
  partition: str | Sequence[int] | None = None,
  inputs: str | Callable[[Tree], Tree] = "x",
  residuals: str | Policy = AUTO,
  **stack_options: Any,
) -> Pipelined:
  """Pipelines a plain loss function over a stack of layers.

  Args:
    loss: `loss(y, batch)`, where y is what the last module returns: a loss for every row, or
      `(loss_sum, weight, metrics)`. None where `layers` is a `LayerStack`, which has its own.
    layers: modules in a row, as `LayerStack.from_modules` takes them, or a `LayerStack`.
    batch: an example batch or its shapes, leaves `[B, ...]`. Without one, which only a `LayerStack`
      allows, rows that do not divide are first refused by the step.
    mesh: a text such as `stage:4,data:2`, as `make_mesh` takes it, or a mesh that it has made.
    schedule: a name, or a schedule for the mesh's stages.
    microbatches: M, where the schedule is named; not read otherwise.
    partition: the number of layers of each stage, or a method of `partitioned`, such as `best`; by
      default as even as can be.
    inputs: which entry of the batch goes into the first module, or a function of the batch.
    residuals: what F keeps for the backward; see `pipeline_value_and_grad`.
    stack_options: `tied` and `trainable` of `LayerStack`, where `layers` is none.

  Returns:
    The step, the evaluation and the placing of parameters, as one object.

  Raises:
    ValueError: modules, mesh, schedule, partition or residuals that do not fit one another, each
      with the numbers that differ; rows that the microbatches do not divide.
  """
  if isinstance(layers, LayerStack):
    if loss is not None or stack_options:
      raise ValueError("a LayerStack has a loss and options of its own; give None, and no others")
    stack = layers
  else:
    if loss is None or batch is None:
      raise ValueError(
        "modules in a row need a loss and an example batch: pipeline(loss, modules, batch)"
      )
    stack = LayerStack.from_modules(layers, loss=loss, batch=batch, inputs=inputs, **stack_options)
  mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
  if isinstance(schedule, str):
    schedule = make_schedule(schedule, devices=mesh.shape[STAGE], microbatches=microbatches)
  if batch is not None:
    check_rows(batch, schedule.microbatches, row_shards(mesh))
  if isinstance(partition, str):
    if batch is None:
      raise ValueError(f"partition={partition!r} needs an example batch")
    stack, _ = partitioned(
      stack, schedule, batch, partition, shards=row_shards(mesh), residuals=residuals
    )
  elif partition is not None:
    stack = dataclasses.replace(stack, partition=partition)
  options = {"residuals": residuals}
  made = Pipelined(stack=stack, schedule=schedule, mesh=mesh, options=options)
  # Building the step checks it: what does not fit is refused here, not at the first call.
  _ = made.value_and_grad
  return made
