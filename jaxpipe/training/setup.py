"""Everything that a run needs, built and checked before anything is compiled or written.

Whatever is wrong with a command is found here, and only here: all errors of this module are the
user's, so that `command.py` may show them as one line. The cheap checks come first, so that a wrong
flag is told before a large text is tokenised.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxpipe.data import EvaluationBatches, TextData, TokenBatches, prepare_text
from jaxpipe.models.cross_entropy import check_chunk
from jaxpipe.models.huggingface import check_weights, read_params
from jaxpipe.models.stack import LayerStack
from jaxpipe.models.transformer import check_sizes, transformer
from jaxpipe.models.transformer_config import TransformerConfig
from jaxpipe.models.transformer_ends import check_positions
from jaxpipe.parallel.mesh import SEQUENCE, STAGE, TENSOR, make_mesh, row_shards
from jaxpipe.parallel.placing import layers_per_stage, param_specs
from jaxpipe.parallel.sequence import check_divides
from jaxpipe.pipeline.executor import pipeline_forward, pipeline_value_and_grad
from jaxpipe.pipeline.memory import MemoryReport, memory_report
from jaxpipe.pipeline.residuals import residual_policy
from jaxpipe.schedules import Schedule, make_schedule
from jaxpipe.training.aot import Device
from jaxpipe.training.choose import Choice, choose_schedule
from jaxpipe.training.config import AUTO, Config
from jaxpipe.training.errors import ConfigError, naming
from jaxpipe.training.optimizer import learning_rate, make_optimizer
from jaxpipe.training.rows import ProcessRows
from jaxpipe.training.run_dir import RunDir, RunRecord, check_config, check_data

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
  """A run that can start.

  Attributes:
    config: what was asked for.
    folder: its run directory, not yet touched.
    mesh, schedule: where it runs, and in which order.
    choice: among what the schedule was chosen; None where it was asked for by name.
    model, stack: what it trains.
    data, train, validation: what it trains on; of batches, the rows that this process needs.
    rows: which those are, and where they go.
    optimizer, learning_rate: how.
    value_and_grad, evaluate: `pipeline_value_and_grad` and `pipeline_forward` of all these.
    memory: what each device will hold, the optimizer's state included.
  """

  config: Config
  folder: RunDir
  mesh: Mesh
  schedule: Schedule
  choice: Choice | None
  model: TransformerConfig
  stack: LayerStack
  data: TextData
  train: TokenBatches
  validation: EvaluationBatches
  rows: ProcessRows
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  value_and_grad: Callable[..., Any]
  evaluate: Callable[..., Any]
  memory: MemoryReport

  @property
  def record(self) -> RunRecord:
    """What marks a run directory as this run's."""
    return RunRecord(config=self.config, data=dict(self.train.identity))

  @property
  def batch_shapes(self) -> Tree:
    """A batch as `jax.ShapeDtypeStruct`s."""
    return batch_shapes(self.config)

  def first_params(self) -> Tree | None:
    """Where `--init_from` says what the run begins from: its weights, placed; otherwise None."""
    if not self.config.init_from:
      return None
    where = (self.schedule, self.mesh)
    return read_params(self.config.init_from, self.model, self.stack, *where)

  def begin(self) -> Self:
    """Makes the run directory, or brings its record up to date; returns this setup."""
    self.folder.begin(self.record, self.data.tokenizer)
    return self


def build(config: Config) -> Setup:
  """Checks a configuration against the machine, the data and the run directory.

  Args:
    config: what was asked for.

  Returns:
    What the loop needs. Nothing is compiled, and nothing written but prepared tokens in the cache.

  Raises:
    ValueError: anything that does not fit; one line with the flag or file, and the remedy.
  """
  mesh = build_mesh(config)
  # Sizes that 1F1B has, auto can have: checked before any text is read.
  first = "1f1b" if config.schedule == AUTO else config.schedule
  schedule = build_schedule(dataclasses.replace(config, schedule=first), mesh)
  config.model(vocabulary_size=1)  # the shapes must fit whatever the tokenizer will say
  _check_batch(config, mesh)
  _check_positions(config, mesh)
  folder = RunDir(pathlib.Path(config.run_dir))
  record = folder.read()
  if record:
    check_config(folder.path, record, config)
  with naming(config.flag("mesh")):
    rows = ProcessRows(mesh, config.batch_size, config.microbatches)
  data, train, validation = _build_data(config, rows.rows)
  if record:
    check_data(folder.path, record, config, dict(train.identity))
  model = config.model(data.tokenizer.vocabulary_size)
  stack, optimizer, shapes = transformer(model), make_optimizer(config), batch_shapes(config)
  if config.init_from:
    with naming(config.flag("init_from")):
      check_weights(config.init_from, model, stack)
  choice = None
  if config.schedule == AUTO:
    choice = choose(config, mesh, stack, shapes, optimizer)
    schedule = choice.schedule
  widths = ("mlp_width", *["shared_width"] * bool(config.shared_width))
  with naming(*config.flags("mesh", "width", *widths, "tokenizer", "head")):
    param_specs(stack.param_shapes(), stack, schedule, mesh)
  # Lowers the schedule to its tick table, which refuses what cannot be executed; traces nothing.
  options: dict[str, Any] = dict(residuals=config.residuals, slack=config.slack)
  with naming(config.flag("schedule")):
    value_and_grad = pipeline_value_and_grad(stack, schedule, mesh, unroll=config.unroll, **options)
  # Tracing a layer finds what its shapes alone do not say. A name is looked for there, too.
  named = bool(residual_policy(config.residuals).names)
  with naming(*config.flags(*(["residuals"] if named else _traced_flags(config)))):
    memory = memory_report(stack, schedule, mesh, shapes, optimizer=optimizer, **options)
  return Setup(
    config=config,
    folder=folder,
    mesh=mesh,
    schedule=schedule,
    choice=choice,
    model=model,
    stack=stack,
    data=data,
    train=train,
    validation=validation,
    rows=rows,
    optimizer=optimizer,
    learning_rate=learning_rate(config),
    value_and_grad=value_and_grad,
    evaluate=pipeline_forward(stack, schedule, mesh),
    memory=memory,
  )


def batch_shapes(config: Config) -> Tree:
  """A batch as `jax.ShapeDtypeStruct`s."""
  # Known without reading one, so that nothing has to be read before everything is checked.
  shape = (config.batch_size, config.sequence_length)
  dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def build_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh that the flags ask for, of these devices or of the machine's.

  Raises:
    ConfigError: it cannot be made of them.
  """
  with naming(*config.flags("mesh", *["slow_axis"] * bool(config.slow_axis))):
    return make_mesh(config.mesh, devices, slow=config.slow_axis or None)


def choose(
  config: Config,
  mesh: Mesh,
  stack: LayerStack,
  shapes: Tree,
  optimizer: optax.GradientTransformation,
) -> Choice:
  """What `--schedule=auto` stands for, within `--memory_limit` or what the devices have.

  Raises:
    ConfigError: nothing fits.
  """
  # Devices of other processes do not tell what they have.
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  limit = 1e9 * config.memory_limit or Device.of(own).memory
  with naming(*config.flags("schedule", "memory_limit", "layers", "mesh", "residuals")):
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


def build_schedule(config: Config, mesh: Mesh) -> Schedule:
  """The schedule that the flags name, over the mesh's stages.

  Raises:
    ConfigError: the sizes do not fit; names the flags.
  """
  # Flags at their defaults decide nothing, and would only lengthen the message.
  optional = [name for name in ("chunks", "backward", "recompute") if getattr(config, name)]
  optional += ["head"] * (config.head != "last")
  with naming(*config.flags("schedule", "microbatches", *optional)):
    schedule = make_schedule(
      config.schedule,
      devices=mesh.shape[STAGE],
      microbatches=config.microbatches,
      chunks=config.chunks or None,
      backward=config.backward or None,
      recompute=config.recompute,
      head=config.head,
    )
  with naming(*config.flags("layers", "mesh", *optional[: config.chunks > 0])):
    layers_per_stage(config.layers, schedule)
  return schedule


def _check_batch(config: Config, mesh: Mesh) -> None:
  M, shards = config.microbatches, row_shards(mesh)
  if config.batch_size % (M * shards):
    flags = " ".join(config.flags("batch_size", "microbatches", "mesh"))
    raise ConfigError(
      f"{flags}: {config.batch_size} rows cannot be cut into {M} microbatches over {shards} data"
      f" shard{'s' * (shards > 1)}; use a multiple of {M * shards} rows"
    )


def _check_positions(config: Config, mesh: Mesh) -> None:
  """Raises ConfigError where the mesh cannot cut heads, experts or positions evenly."""
  sizes = dict(mesh.shape)
  optional = ["ulysses"] * (config.ulysses > 1) + ["experts"] * bool(config.experts)
  optional += ["expert_axes", "sequence_parallel"] * (config.expert_axes != "expert")
  with naming(*config.flags("mesh", "heads", "kv_heads", *optional)):
    check_sizes(config.model(vocabulary_size=1), sizes)
  T, c = config.sequence_length, sizes[SEQUENCE]
  with naming(*config.flags("sequence_length", "mesh", "sequence_parallel")):
    check_divides(T, c, sizes[TENSOR] if config.sequence_parallel else 1)
  with naming(*config.flags("sequence_length", "max_positions")):
    check_positions(config.model(vocabulary_size=1), T)
  if config.logits_chunk:
    with naming(*config.flags("logits_chunk", "sequence_length", "mesh")):
      check_chunk(T // c, min(config.logits_chunk, T // c))


def _traced_flags(config: Config) -> tuple[str, ...]:
  experts = ("experts", "capacity_factor", "capacity_group", "expert_axes", "sequence_parallel")
  return ("mesh", "sequence_length", *(experts if config.experts else ()))


def _build_data(
  config: Config, rows: Sequence[int]
) -> tuple[TextData, TokenBatches, EvaluationBatches]:
  data = prepare_text(
    config.text,
    config.tokenizer,
    cache_folder(config.data_cache, "data"),
    validation_fraction=config.validation_fraction,
  )
  B, T = config.batch_size, config.sequence_length
  # The batches know the bins, not the text and flags that they come from.
  with naming(*config.flags("text", "sequence_length")):
    # With windows always cut at the same places, some tokens would never be seen in context.
    train = TokenBatches(data.train, B, T, config.seed, rows=rows, random_offset=True)
    return data, train, EvaluationBatches(data.validation, B, T, rows=rows)


def cache_folder(asked: str, name: str) -> pathlib.Path:
  """Returns the folder that a flag asks for, or one in the user's cache."""
  if asked:
    return pathlib.Path(asked)
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "jaxpipe" / name
