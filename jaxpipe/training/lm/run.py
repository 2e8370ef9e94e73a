"""A language-model run, built from its flags and checked before anything is compiled or written.

Whatever is wrong with a command is found here, and only here: all errors of this module are the
user's, so that `launch` may show them as one line. The cheap checks come first, so that a wrong
flag is reported before a large text is tokenised:

    mesh, schedule, sizes of the model  ->  run directory  ->  text and tokenizer  ->  plan

`TaskRun` of `training/command/task_run.py` is its counterpart for all other experiments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.data import EvaluationBatches, TextData, TokenBatches, prepare_text
from jaxpipe.data.text.windows import Batch
from jaxpipe.models.huggingface import check_weights, read_params
from jaxpipe.models.transformer.adapters import divide
from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.cross_entropy import check_chunk
from jaxpipe.models.transformer.decoder import check_sizes, training_flops, transformer
from jaxpipe.models.transformer.ends import check_positions
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR
from jaxpipe.parallel.placing import layers_per_stage, place
from jaxpipe.parallel.sequence import check_divides
from jaxpipe.schedules import Schedule
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.command.cache import cache_folder
from jaxpipe.training.flags.errors import naming
from jaxpipe.training.lm.config import Config
from jaxpipe.training.loop.validation import make_validation
from jaxpipe.training.plan import plan
from jaxpipe.training.plan.plan import build_mesh, check_batch, make_plan
from jaxpipe.training.plan.rows import ProcessRows
from jaxpipe.training.plan.run import Run, Validate
from jaxpipe.training.plan.run_dir import RunDir, check_config, check_data

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LmRun(Run):
  """A run of a language model.

  Attributes:
    config: the flags.
    model: configuration of the transformer that is trained.
    data: the tokenised text and its tokenizer.
    train: batches of the training text; of each batch the rows that this process needs.
    validation: batches of the held-out text; of each batch the rows that this process needs.
  """

  config: Config
  model: TransformerConfig
  data: TextData
  train: TokenBatches
  validation: EvaluationBatches

  def first_values(self, key: jax.Array) -> tuple[Tree, Tree] | None:
    """Reads the weights of `--init_from` to their places; None without that flag.

    Adapters, which no such folder has, are fresh.
    """
    folder, stack, order = self.config.init_from, self.stack, (self.schedule, self.mesh)
    if not folder:
      return None
    base = _base(self.model)
    if stack.uniform:
      whole = read_params(folder, self.model, base, *order)
      # Without anything frozen the base is the model.
      fresh = stack.init(key, self.batch_shapes, *order) if stack.has_state else whole
      return divide(stack, whole, fresh)
    # Of layers that are not alike, stages lie packed, and a canonical tree is packed whole.
    whole = read_params(folder, self.model, base)
    divided = divide(stack, whole, stack.init(key, self.batch_shapes))
    # Of NumPy arrays every process has the whole, and puts its own part on its own devices.
    params, state = (place(jax.tree.map(np.asarray, tree), stack, *order) for tree in divided)
    return params, state

  def begin(self) -> Self:
    """Makes the run directory, with the tokenizer in it, so that sampling needs no text."""
    self.folder.begin(self.record, self.data.tokenizer)
    return self

  @contextlib.contextmanager
  def batches(self, start: int) -> Iterator[Iterator[Batch]]:
    """Yields an iterator over batches from `start` on, read ahead in threads that end with it."""
    batches = self.train.iterate(start)
    try:
      yield batches
    finally:
      batches.close()

  def validator(self) -> Validate:
    """Returns `validate(state)`, which measures nats per byte over the whole held-out text."""
    tokenizer = self.data.tokenizer
    validate = make_validation(self.evaluate, self.validation, tokenizer, self.rows.put)
    return lambda state: {
      "loss": validate(state.validation_params, *filter(None, [state.model_state]))
    }


def build_run(config: Config) -> LmRun:
  """Checks a configuration against the machine, the data and the run directory.

  Args:
    config: the flags of the command.

  Returns:
    A run that can begin. Nothing has been compiled, and nothing written but prepared tokens in the
    cache.

  Raises:
    ValueError: anything that does not fit; one line with the flag or file, and the remedy.
  """
  mesh = build_mesh(config)
  schedule = build_schedule(config, mesh)  # before any text is read
  config.model(vocabulary_size=1)  # the shapes must fit whatever the tokenizer will say
  check_batch(config, mesh)
  _check_positions(config, mesh)
  folder = RunDir(pathlib.Path(config.run_dir))
  record = folder.read(Config)
  if record:
    check_config(folder.path, record, config)
  with naming(config.flag("mesh")):
    rows = ProcessRows(mesh, config.batch_size, config.microbatches)
  data, train, validation = _build_data(config, rows.rows)
  if record:
    check_data(folder.path, record, train.identity, lambda name: config.flag(_flag_of(name)))
  model = config.model(data.tokenizer.vocabulary_size)
  shared, freeze = ["shared_width"] * bool(config.shared_width), ["freeze"] * bool(config.freeze)
  with naming(config.flag("freeze")):
    stack = transformer(model, config.freeze)
  if config.init_from:
    with naming(config.flag("init_from")):
      check_weights(config.init_from, model, _base(model))
  planned = make_plan(
    config,
    mesh,
    schedule,
    stack,
    batch_shapes(config),
    # Frozen layers are not alike where others train, and what can be done with these is less.
    chosen_by=["layers", *freeze],
    placed_by=["width", "mlp_width", *shared, "tokenizer", "head", *freeze],
    filled_by=freeze,
    traced_by=_traced_flags(config),
  )
  return LmRun(
    **vars(planned),
    config=config,
    folder=folder,
    rows=rows,
    identity=train.identity,
    data_line=f"data: {len(data.train.tokens):,} tokens to train on,"
    f" {len(data.validation.tokens):,} held out",
    tokens=config.batch_size * config.sequence_length,
    loss_unit="nats per token",
    flops_per_token=training_flops(model, stack, config.sequence_length),
    validation_unit="nats per byte",
    model=model,
    data=data,
    train=train,
    validation=validation,
  )


def _base(model: TransformerConfig) -> LayerStack:
  """The model without adapters, all of whose parameters train."""
  return transformer(dataclasses.replace(model, lora=None))


def batch_shapes(config: Config) -> Tree:
  """Returns the shapes of a batch: `tokens`, `targets` int32 [B, T], `weights` float32 [B, T]."""
  # Known without reading one, so that nothing has to be read before everything is checked.
  shape = (config.batch_size, config.sequence_length)
  dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def build_schedule(config: Config, mesh: Mesh) -> Schedule:
  """Builds the schedule that the flags name, over the mesh's stages.

  Raises:
    ConfigError: the sizes do not fit, or the layers do not fill the stages; names the flags.
  """
  schedule = plan.build_schedule(config, mesh, config.head)
  with naming(*config.flags("layers", "mesh", *["chunks"] * (config.chunks > 0))):
    layers_per_stage(config.layers, schedule)
  return schedule


def _check_positions(config: Config, mesh: Mesh) -> None:
  """Raises ConfigError where the mesh cannot divide heads, experts or positions evenly."""
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
  """Names the flags that decide whether a layer can be traced, for the message if it cannot."""
  experts = ("experts", "capacity_factor", "capacity_group", "expert_axes", "sequence_parallel")
  return ("sequence_length", *(experts if config.experts else ()))


def _build_data(
  config: Config, rows: Sequence[int]
) -> tuple[TextData, TokenBatches, EvaluationBatches]:
  """Tokenises the text, or finds it in the cache; of each batch, `rows` will be read."""
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


def _flag_of(name: str) -> str:
  """Names the flag that decides an entry of the data's identity, for the message if it differs."""
  return "tokenizer" if name == "tokenizer" else "text"
