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

from jaxpipe.parallel.mesh import make_mesh, row_shards, stages_of
from jaxpipe.parallel.placing import place, unplace
from jaxpipe.pipeline.batch import check_dtypes, check_rows, filled_up, given_state
from jaxpipe.pipeline.check import Report, check
from jaxpipe.pipeline.executor import pipeline_forward, pipeline_value_and_grad
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.partitioned import partitioned
from jaxpipe.pipeline.predict import pipeline_predict
from jaxpipe.pipeline.update.by_variable import by_variable
from jaxpipe.pipeline.update.slots import StateLayouts, is_part
from jaxpipe.pipeline.update.variables import Variables
from jaxpipe.schedules import Schedule, make_schedule
from jaxpipe.stack.context import leaves_of_rows
from jaxpipe.stack.forward import given_back
from jaxpipe.stack.from_modules import Loss
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
    example: shapes and dtypes of the batch that it was made for; None where none was given. Later
      batches may have other rows, and no other dtypes.
  """

  stack: LayerStack
  schedule: Schedule
  mesh: Mesh
  options: dict[str, Any]
  example: Tree = None

  def __str__(self) -> str:
    """Schedule, mesh and stages in a few lines.

    Of a packed stack, the modules of each stage, and why layers are not of one kind; of any, how
    many norms and dropouts were found switched off.
    """
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
    for i, why in self.stack.network.reasons.items():
      lines.append(f"layers/{i} is of another kind than layers/{i - 1}: {why}")
    off = sum(spec.switched_off for spec in self.stack.network.specs.values())
    if off:
      lines.append(f"{off} norms or dropouts were given in evaluation mode, and stay in it")
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
    compiled at its first call; `pipeline_value_and_grad` describes arguments and results. Where the
    loss is one for every row, the batch may have any number of rows: rows of weight 0 fill it up.

    Raises:
      ValueError: when it is called, rows that do not divide, where the head gives sums of its own
        or the stack has statistics, of which the rows that fill up would be part.
    """
    step = pipeline_value_and_grad(self.stack, self.schedule, self.mesh, **self.options)
    return _like(self.example, self._filling(step, True))

  @functools.cached_property
  def evaluate(self) -> Callable[..., Any]:
    """An evaluation `(params, batch, state=None) -> (loss, metrics)`: forwards only, no dropout.

    Running statistics take the place of the batch's own; see `pipeline_forward`. Where the loss is
    one for every row, the batch may have any number of rows.
    """
    run = pipeline_forward(self.stack, self.schedule, self.mesh)
    return _like(self.example, self._filling(run, False))

  def _filling(self, run: Callable[..., Any], trains: bool) -> Callable[..., Any]:
    """Returns `run` for any number of rows, where the head leaves out those that fill up."""
    return _filling(self.stack, self.schedule.microbatches, row_shards(self.mesh), run, trains)

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

  def modules(self, params: Tree, state: Tree | None = None) -> list[Any]:
    """Gives trained values back as new objects of the kinds that were given.

    Args:
      params: placed parameters.
      state: placed model state, where the stack has any.

    Returns:
      NNX modules, for Linen modules their variables, functions as they were, for factories what
      they build, in the given order; of a `LayerStack`, embedding, layers and head. What was shared
      is shared.

    Raises:
      ValueError: the stack has state and none is given, or the other way round.
    """
    state = given_state(self.stack, state)
    return given_back(self.stack, self.unplace(params), self.unplace(state) if state else {})

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

    It runs over the pipeline, so that no device holds the whole model, and compiles a program for
    every number of rows of a microbatch; see `pipeline_predict`.

    Args:
      params: placed parameters.
      batch: arrays, leaves `[B, ...]`, B of any size.
      state: placed model state, where the stack has any.

    Returns:
      Leaves `[B, ...]`, with rows that lie where those of the batch do; of NumPy arrays, on every
      device.

    Raises:
      ValueError: the stack has state and none is given, or the other way round; an output without
        rows; a mesh with `sequence`.
    """
    return self._predict(params, batch, state)

  # A property of this object, so that the stack and its programs go when the object goes: as a
  # static argument of a function of the module, the stack would live as long as the process.
  @functools.cached_property
  def _predict(self) -> Callable[..., Tree]:
    return _like(self.example, pipeline_predict(self.stack, self.schedule, self.mesh))


def _like(example: Tree, run: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `run`, which refuses a batch of other dtypes than the example's."""
  if example is None:
    return run

  @functools.wraps(run)
  def checking(params: Tree, batch: Tree, *args: Any, **named: Any) -> Any:
    check_dtypes(batch, example)
    return run(params, batch, *args, **named)

  return checking


def _filling(
  stack: LayerStack, M: int, shards: int, run: Callable[..., Any], trains: bool
) -> Callable[..., Any]:
  """Returns `run` with its second argument, the batch, filled up with rows that do not count.

  Args:
    stack: that `run` runs. Where its head sums up by itself, nothing is filled up.
    M: number of microbatches.
    shards: number of data shards.
    run: a step or an evaluation, `(params, batch, ...)`.
    trains: whether statistics are those of the batch.
  """
  if not issubclass(stack.network.specs["head"].kind, Loss):
    return run
  statistics = [
    spec.name for spec in stack.network.specs.values() if any(jax.tree.leaves(spec.changing))
  ]

  @functools.wraps(run)
  def filling(params: Tree, batch: Tree, *args: Any, **named: Any) -> Any:
    filled = filled_up(batch, M, shards)
    if filled is not batch and trains and statistics:
      rows = len(leaves_of_rows(batch)[0][1])
      raise ValueError(
        f"a batch of {rows} rows cannot be filled up to a multiple of {M * shards}, for"
        f" {', '.join(statistics)} would count the rows that fill up in their statistics; use a"
        f" multiple of {M * shards} rows, or leave these out"
      )
    return run(params, filled, *args, **named)

  return filling


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
  mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
  if batch is not None:
    check_rows(batch, 1)  # before modules are traced on it
  if isinstance(layers, LayerStack):
    if loss is not None or stack_options:
      raise ValueError("a LayerStack has a loss and options of its own; give None, and no others")
    stack = layers
    if batch is not None and stack.network.reasons and stack.example_batch is None:
      # Layers whose attributes differ may compute the same, which a batch shows.
      stack = dataclasses.replace(stack, example_batch=batch)
  else:
    if loss is None or batch is None:
      raise ValueError(
        "modules in a row need a loss and an example batch: pipeline(loss, modules, batch)"
      )
    stack = LayerStack.from_modules(layers, loss=loss, batch=batch, inputs=inputs, **stack_options)
  stages = stages_of(mesh)
  if isinstance(schedule, str):
    schedule = make_schedule(schedule, devices=stages, microbatches=microbatches)
  if batch is not None:
    shards = row_shards(mesh)
    rows = check_rows(batch, schedule.microbatches, shards) // shards
    for spec in stack.network.specs.values():
      spec.check_draws(rows)
  if isinstance(partition, str):
    if batch is None:
      raise ValueError(f"partition={partition!r} needs an example batch")
    stack, _ = partitioned(
      stack, schedule, batch, partition, shards=row_shards(mesh), residuals=residuals
    )
  elif partition is not None:
    stack = dataclasses.replace(stack, partition=partition)
  options = {"residuals": residuals}
  example = None if batch is None else jax.eval_shape(lambda batch: batch, batch)
  made = Pipelined(stack=stack, schedule=schedule, mesh=mesh, options=options, example=example)
  # Building the step checks it: what does not fit is refused here, not at the first call.
  _ = made.value_and_grad
  return made
