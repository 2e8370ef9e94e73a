"""Plans a run from its flags: its mesh, its schedule, its step and the memory that it will need.

No function in this module knows what is trained. All errors are the user's, `ConfigError`s of one
line that begin with the flags that decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import STAGE, make_mesh, row_shards
from jaxpipe.parallel.placing import param_specs
from jaxpipe.pipeline.costs.memory import MemoryReport, memory_report
from jaxpipe.pipeline.executor import pipeline_forward, pipeline_value_and_grad
from jaxpipe.pipeline.layer.residuals import residual_policy
from jaxpipe.schedules import Schedule, make_schedule
from jaxpipe.schedules.build import TICKS
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.chips import DeviceSpec
from jaxpipe.training.flags.errors import ConfigError, naming
from jaxpipe.training.flags.run_config import AUTO, RunConfig
from jaxpipe.training.plan.choose import Choice, choose_schedule
from jaxpipe.training.plan.optimizer import learning_rate, placed_optimizer

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
  """How a stack is trained: everything that is decided before its data and its run directory.

  Attributes:
    mesh: the devices, by axis.
    schedule: the order of actions on each of the mesh's stages.
    choice: the schedules that this one was chosen from; None where it was asked for by name.
    stack: the model.
    batch_shapes: a whole batch as `jax.ShapeDtypeStruct`s, leaves [B, ...].
    optimizer: the optax transformation, for parameters as they are placed.
    learning_rate: `step -> rate`, the one that the optimizer has.
    value_and_grad: `pipeline_value_and_grad` of stack, schedule and mesh.
    evaluate: `pipeline_forward` of stack, schedule and mesh.
    memory: what each device will hold, the optimizer's state included.
  """

  mesh: Mesh
  schedule: Schedule
  choice: Choice | None
  stack: LayerStack
  batch_shapes: Tree
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  value_and_grad: Callable[..., Any]
  evaluate: Callable[..., Any]
  memory: MemoryReport


def make_plan(
  config: RunConfig,
  mesh: Mesh,
  schedule: Schedule,
  stack: LayerStack,
  batch_shapes: Tree,
  *,
  chosen_by: Collection[str] = (),
  placed_by: Collection[str] = (),
  filled_by: Collection[str] = (),
  traced_by: Collection[str] = (),
) -> Plan:
  """Plans how a stack is trained: lowers the schedule and traces a layer, and compiles nothing.

  Args:
    config: the flags.
    mesh: from `build_mesh`.
    schedule: from `build_schedule`; with `--schedule=auto` the best one takes its place.
    stack: the model.
    batch_shapes: of a whole batch, leaves [B, ...].
    chosen_by: flags to name, besides the plan's own, where no schedule fits.
    placed_by: flags to name besides where the mesh cannot divide a parameter.
    filled_by: flags to name besides where the layers do not fill the stages.
    traced_by: flags to name besides where a layer cannot be traced.

  Raises:
    ConfigError: the run cannot be executed.
  """
  choice = None
  if config.schedule == AUTO:
    choice = choose(config, mesh, stack, batch_shapes, chosen_by)
    schedule = choice.schedule
  with naming(*config.flags("mesh", *placed_by)):
    param_specs(stack.param_shapes(), stack, schedule, mesh)
  # Lowers the schedule to its tick table, which refuses what cannot be executed; traces nothing.
  options: dict[str, Any] = dict(residuals=config.residuals, slack=config.slack)
  with naming(*config.flags("schedule", *filled_by)):
    value_and_grad = pipeline_value_and_grad(stack, schedule, mesh, unroll=config.unroll, **options)
  optimizer = placed_optimizer(config, stack, schedule, mesh)
  # Tracing a layer finds what its shapes alone do not say. A name is looked for there, too.
  named = bool(residual_policy(config.residuals).names)
  with naming(*config.flags(*(["residuals"] if named else ["mesh", *traced_by]))):
    options |= dict(optimizer=optimizer, averages=config.ema > 0)
    memory = memory_report(stack, schedule, mesh, batch_shapes, **options)
  return Plan(
    mesh=mesh,
    schedule=schedule,
    choice=choice,
    stack=stack,
    batch_shapes=batch_shapes,
    optimizer=optimizer,
    learning_rate=learning_rate(config),
    value_and_grad=value_and_grad,
    evaluate=pipeline_forward(stack, schedule, mesh),
    memory=memory,
  )


def build_mesh(config: RunConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Makes the mesh that the flags ask for.

  Args:
    config: the flags.
    devices: of which it is made; None: all that JAX knows.

  Raises:
    ConfigError: the devices do not make such a mesh.
  """
  with naming(*config.flags("mesh", *["slow_axis"] * bool(config.slow_axis))):
    return make_mesh(config.mesh, devices, slow=config.slow_axis or None)


def build_schedule(config: RunConfig, mesh: Mesh, head: str = "last") -> Schedule:
  """Builds the schedule that the flags name, over the mesh's stages; for `auto` it is 1F1B.

  Args:
    config: the flags.
    mesh: its size along `stage` is the number of pipeline devices.
    head: as for `make_schedule`; anything but `last` must come from a flag `--head`.

  Raises:
    ConfigError: the sizes do not fit; names the flags.
  """
  optional = schedule_flags(config) + ["head"] * (head != "last")
  with naming(*config.flags("schedule", "microbatches", *optional)):
    return make_schedule(
      # To check sizes with: whatever 1F1B can run, auto has a schedule for.
      "1f1b" if config.schedule == AUTO else config.schedule,
      devices=mesh.shape[STAGE],
      microbatches=config.microbatches,
      chunks=config.chunks or None,
      backward=config.backward or None,
      recompute=config.recompute,
      ticks=config.ticks,
      head=head,
    )


def schedule_flags(config: RunConfig) -> list[str]:
  """Names the flags that shape a schedule and are set: at their defaults they decide nothing."""
  names = [name for name in ("chunks", "backward", "recompute") if getattr(config, name)]
  return names + ["ticks"] * (config.ticks != TICKS[0])


def check_batch(config: RunConfig, mesh: Mesh) -> None:
  """Raises ConfigError where the rows of a batch do not divide into microbatches and shards."""
  M, shards = config.microbatches, row_shards(mesh)
  if config.batch_size % (M * shards):
    flags = " ".join(config.flags("batch_size", "microbatches", "mesh"))
    raise ConfigError(
      f"{flags}: {config.batch_size} rows cannot be cut into {M} microbatches over {shards} data"
      f" shard{'s' * (shards > 1)}; use a multiple of {M * shards} rows"
    )


def choose(
  config: RunConfig,
  mesh: Mesh,
  stack: LayerStack,
  shapes: Tree,
  flags: Collection[str] = (),
) -> Choice:
  """Chooses the schedule of `--schedule=auto`, within `--memory_limit` or the devices' memory.

  Args:
    config: the flags.
    mesh, stack: what is trained, and where.
    shapes: of a whole batch, leaves [B, ...].
    flags: names of flags for the message where nothing fits, besides those read here.

  Raises:
    ConfigError: no schedule fits.
  """
  # Only of its own devices does a process learn how much memory they have.
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  limit = 1e9 * config.memory_limit or DeviceSpec.of(own).memory
  with naming(*config.flags("schedule", "memory_limit", *flags, "mesh", "residuals")):
    return choose_schedule(
      stack,
      mesh,
      shapes,
      microbatches=config.microbatches,
      residuals=config.residuals,
      unroll=config.unroll,
      slack=config.slack,
      optimizer=lambda schedule: placed_optimizer(config, stack, schedule, mesh),
      averages=config.ema > 0,
      memory_limit=limit,
    )
