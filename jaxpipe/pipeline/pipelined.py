"""A loss over a stack of layers, pipelined: for those who have a training loop of their own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import STAGE, make_mesh, row_shards
from jaxpipe.parallel.placing import place, unplace
from jaxpipe.pipeline.batch import check_rows, given_state
from jaxpipe.pipeline.check import Report, check
from jaxpipe.pipeline.executor import pipeline_forward, pipeline_value_and_grad
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.partitioned import partitioned
from jaxpipe.schedules import Schedule, make_schedule
from jaxpipe.stack.forward import modules, run_layers
from jaxpipe.stack.stack import LayerStack

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pipelined:
  """A stack, a schedule and a mesh; every method takes and returns what lies on that mesh.

  Attributes:
    stack, schedule, mesh: what runs, in which order, where.
    options: of `pipeline_value_and_grad`.
  """

  stack: LayerStack
  schedule: Schedule
  mesh: Mesh
  options: dict[str, Any]

  def __str__(self) -> str:
    """What runs where, in a few lines."""
    sizes = ",".join(f"{axis}:{n}" for axis, n in self.mesh.shape.items() if n > 1) or "one device"
    laid = self.stack.laid_out(self.schedule)
    lines = [
      f"{self.schedule.name} of {self.schedule.microbatches} microbatches over {sizes}"
      f" ({self.schedule.stages} stages, {laid.depth if laid.uniform else self.stack.depth} layers)"
    ]
    if not laid.uniform:
      label = lambda name: f"{name} {self.stack.network.specs[name].label}"  # noqa: E731
      lines += [f"stage {s}: {', '.join(map(label, names))}" for s, names in enumerate(laid.stages)]
    return "\n".join(lines)

  def init(self, key: jax.Array, batch: Tree) -> Tree:
    """Fresh parameters; each device makes its own."""
    return self.stack.init(key, batch, self.schedule, self.mesh)

  def init_state(self, key: jax.Array, batch: Tree) -> Tree:
    """The state that goes with them: statistics and frozen weights."""
    return self.stack.init_state(key, batch, self.schedule, self.mesh)

  @functools.cached_property
  def value_and_grad(self) -> Callable[..., Any]:
    """See `pipeline_value_and_grad`; compiled at its first call."""
    return pipeline_value_and_grad(self.stack, self.schedule, self.mesh, **self.options)

  @functools.cached_property
  def evaluate(self) -> Callable[..., Any]:
    """See `pipeline_forward`."""
    return pipeline_forward(self.stack, self.schedule, self.mesh)

  def place(self, tree: Tree) -> Tree:
    """A canonical tree (parameters, moments, state) to its places."""
    return place(tree, self.stack, self.schedule, self.mesh) if jax.tree.leaves(tree) else tree

  def unplace(self, tree: Tree) -> Tree:
    """Back to the canonical tree, a leaf for every variable of every module."""
    return unplace(tree, self.stack, self.schedule) if jax.tree.leaves(tree) else tree

  def check(self, batch: Tree) -> Report:
    """Every gradient leaf of fresh parameters against the unpipelined model's; `jaxpipe.check`."""
    return check(self.stack, self.schedule, self.mesh, batch, **self.options)

  def predict(self, params: Tree, batch: Tree, state: Tree | None = None) -> Tree:
    """What the last layer returns for a batch of any size, without dropout, by moving averages.

    All layers run on this process's first device, which must have room for them.

    Raises:
      ValueError: the stack has state and none is given, or the other way round.
    """
    state = given_state(self.stack, state)
    trees = self.unplace(params), self.unplace(state) if state else {}, batch
    return _predict(self.stack, *jax.device_put(trees, self.mesh.local_devices[0]))


@functools.partial(jax.jit, static_argnums=0)
def _predict(stack: LayerStack, params: Tree, state: Tree, batch: Tree) -> Tree:
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
    loss: `loss(y, batch)`, a loss for every row, or `(loss_sum, weight, metrics)`; None where
      `layers` is a `LayerStack`, which has its own.
    layers: modules in a row, or a `LayerStack`; see `LayerStack.from_modules`.
    batch: an example batch or its shapes.
    mesh: as `make_mesh` takes it, or one that it has made.
    schedule: a name, or a schedule for the mesh's stages.
    microbatches: M, where the schedule is named.
    partition: how many layers each stage has, or a method of `partitioned`, such as `best`; by
      default as even as can be.
    inputs: see `LayerStack.from_modules`.
    residuals: see `pipeline_value_and_grad`.
    stack_options: of `LayerStack`: tied, trainable.

  Raises:
    ValueError: as each of these does; or rows that the microbatches do not divide.
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
  made.value_and_grad  # refuses what does not fit  # noqa: B018
  return made
