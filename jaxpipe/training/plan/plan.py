"""Where a run computes and in which order: from flags to mesh, schedule, step and memory.

Nothing here knows what is trained. All errors are the user's, in one line, with the flags that
decide before them.
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
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.aot.aot import DeviceSpec
from jaxpipe.training.flags.errors import ConfigError, naming
from jaxpipe.training.flags.run_config import AUTO, RunConfig
from jaxpipe.training.plan.choose import Choice, choose_schedule
from jaxpipe.training.plan.optimizer import learning_rate, make_optimizer, placed_mask

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
  """How a stack is trained.

  Attributes:
    mesh, schedule: where, and in which order.
    choice: among what the schedule was chosen; None where it was asked for by name.
    stack: what.
    batch_shapes: a batch as `jax.ShapeDtypeStruct`s.
    optimizer, learning_rate: how.
    value_and_grad, evaluate: `pipeline_value_and_grad` and `pipeline_forward` of all these.
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
  """Lowers the schedule and traces a layer; compiles nothing.

  Args:
    config: what was asked for.
    mesh, schedule: from `build_mesh` and `build_schedule`; the schedule gives way to the best one
      where `--schedule=auto`.
    stack, batch_shapes: what is trained.
    chosen_by, placed_by, filled_by, traced_by: flags to name, besides the plan's own, where no
      schedule fits, a parameter cannot be cut, the layers do not fill the stages, or what is traced
      does not fit.

  Raises:
    ConfigError: it cannot be executed.
  """
  optimizer, choice = make_optimizer(config), None
  if config.schedule == AUTO:
    choice = choose(config, mesh, stack, batch_shapes, optimizer, chosen_by)
    schedule = choice.schedule
  optimizer = make_optimizer(config, placed_mask(stack, schedule))
  with naming(*config.flags("mesh", *placed_by)):
    param_specs(stack.param_shapes(), stack, schedule, mesh)
  # Lowers the schedule to its tick table, which refuses what cannot be executed; traces nothing.
  options: dict[str, Any] = dict(residuals=config.residuals, slack=config.slack)
  with naming(*config.flags("schedule", *filled_by)):
    value_and_grad = pipeline_value_and_grad(stack, schedule, mesh, unroll=config.unroll, **options)
  # Tracing a layer finds what its shapes alone do not say. A name is looked for there, too.
  named = bool(residual_policy(config.residuals).names)
  with naming(*config.flags(*(["residuals"] if named else ["mesh", *traced_by]))):
    memory = memory_report(stack, schedule, mesh, batch_shapes, optimizer=optimizer, **options)
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
  """The mesh that the flags ask for, of these devices or of the machine's.

  Raises:
    ConfigError: it cannot be made of them.
  """
  with naming(*config.flags("mesh", *["slow_axis"] * bool(config.slow_axis))):
    return make_mesh(config.mesh, devices, slow=config.slow_axis or None)


def build_schedule(config: RunConfig, mesh: Mesh, head: str = "last") -> Schedule:
  """The schedule that the flags name, over the mesh's stages; for `auto` one to check sizes with.

  Args:
    config, mesh: of the run.
    head: as for `make_schedule`; anything but `last` is a flag of the configuration, too.

  Raises:
    ConfigError: the sizes do not fit; names the flags.
  """
  optional = schedule_flags(config) + ["head"] * (head != "last")
  with naming(*config.flags("schedule", "microbatches", *optional)):
    return make_schedule(
      # Sizes that 1F1B has, auto can have.
      "1f1b" if config.schedule == AUTO else config.schedule,
      devices=mesh.shape[STAGE],
      microbatches=config.microbatches,
      chunks=config.chunks or None,
      backward=config.backward or None,
      recompute=config.recompute,
      head=head,
    )


def schedule_flags(config: RunConfig) -> list[str]:
  """Those that shape a schedule and are set: at their defaults they decide nothing."""
  return [name for name in ("chunks", "backward", "recompute") if getattr(config, name)]


def check_batch(config: RunConfig, mesh: Mesh) -> None:
  """Raises ConfigError where the rows cannot be cut."""
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
  optimizer: optax.GradientTransformation,
  flags: Collection[str] = (),
) -> Choice:
  """What `--schedule=auto` stands for, within `--memory_limit` or what the devices have.

  Raises:
    ConfigError: nothing fits; names `flags` besides its own.
  """
  # Devices of other processes do not tell what they have.
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
      optimizer=optimizer,
      memory_limit=limit,
    )
