"""Everything that a training run can be told, as one frozen value.

Each field is a flag of the same name (`flags.py`). Its metadata hold the flag's help and whether a
run may be resumed with another value: what decides the numbers (model, data, optimizer, seed) may
not change, where and how they are computed (mesh, schedule, ...) may, and so may the length of the
run. The tokenizer and the text are compared by what they hold, not by their names.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp

from jaxpipe.models.completep import CompleteP
from jaxpipe.models.moe import MoeConfig
from jaxpipe.models.rotary import RopeScaling
from jaxpipe.models.transformer_config import CHOICES, TransformerConfig
from jaxpipe.parallel.mesh import SLOW
from jaxpipe.pipeline.residuals import residual_policy
from jaxpipe.pipeline.unroll import SHAPES
from jaxpipe.training.errors import ConfigError, naming

DTYPES = ("float32", "bfloat16")
# In place of a schedule's name.
AUTO = "auto"


def _same(default: Any, help: str) -> Any:
  """A field that a resumed run must repeat."""
  return dataclasses.field(default=default, metadata={"help": help, "may_change": False})


def _free(default: Any, help: str) -> Any:
  """A field that a resumed run may change."""
  return dataclasses.field(default=default, metadata={"help": help, "may_change": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A language-model run; the fields' help texts say what each means.

  Raises:
    ConfigError: a value that is impossible whatever the others are.
  """

  preset: str = _free(
    "", "shape of a known model, such as gpt2 or qwen3-0.6b; flags given override"
  )
  init_from: str = _free(
    "", "folder with config.json and *.safetensors: begins from its weights, and takes its shape"
  )
  vocabulary_size: int = _same(0, "rows of the tables; 0: as many as the tokenizer has ids")
  layers: int = _same(4, "layers of the model")
  width: int = _same(128, "width D of the model")
  heads: int = _same(4, "query heads")
  kv_heads: int = _same(2, "key and value heads, a divisor of --heads")
  head_width: int = _same(0, "width of a head; 0: --width over --heads")
  mlp: str = _same("swiglu", "swiglu or gelu")
  mlp_width: int = _same(512, "hidden width of the MLP; 0: 8/3 of the width, 4 times for gelu")
  norm: str = _same("rmsnorm", "rmsnorm or layernorm")
  norm_epsilon: float = _same(1e-6, "what the norms add to the mean square")
  qk_norm: bool = _same(False, "norms queries and keys, each head by itself")
  bias: str = _same("none", "matrices with a bias: none, qkv, or all of attention and MLP")
  positions: str = _same("rotary", "rotary or learned")
  max_positions: int = _same(0, "learned positions; 0: --sequence_length")
  rope_base: float = _same(10_000.0, "base of the rotary frequencies")
  rope_scaling: str = _same("", "Llama 3's FACTOR,LOW,HIGH,LENGTH, such as 32,1,4,8192; none")
  tied: bool = _same(False, "the head multiplies by the embedding's own table")
  experts: int = _same(0, "experts in place of each layer's MLP, each --mlp_width wide; 0: an MLP")
  top_k: int = _same(2, "experts that a token visits")
  capacity_factor: float = _same(
    0.0, "slots of an expert over an even share; tokens beyond them are dropped; 0: none are"
  )
  capacity_group: int = _same(0, "contiguous positions that share an expert's slots; 0: a row")
  shared_width: int = _same(0, "hidden width of an expert that every token visits besides; 0: none")
  balance_loss: float = _same(0.01, "coefficient of the experts' load-balance loss")
  router_z_loss: float = _same(0.001, "coefficient of the router's z-loss")
  dropout: float = _same(0.0, "rate after attention and after the MLP")
  dtype: str = _same("float32", "arithmetic: float32 or bfloat16; parameters are float32")

  text: str = _free("", "files with commas between, a folder of .txt, or one token .bin")
  tokenizer: str = _free("byte", "byte, bpe:SIZE (trained on the text) or a tokenizer FILE.json")
  validation_fraction: float = _same(0.05, "share of the text held out, at its end")
  data_cache: str = _free("", "folder of prepared tokens; default: in the user's cache")
  batch_size: int = _same(8, "rows B of a batch, over all microbatches and data shards")
  sequence_length: int = _same(128, "tokens T of a row")
  seed: int = _same(0, "of parameters, data order and dropout")

  learning_rate: float = _same(2e-3, "peak learning rate")
  warmup_steps: int = _same(100, "steps of linear warm-up; then cosine, to a tenth at --steps")
  weight_decay: float = _same(0.1, "decoupled decay of matrices; norm scales have none")
  completep_base: str = _same(
    "", "WIDTHxLAYERS of a model that the rates were found on, scaled from there by CompleteP; none"
  )
  clip_norm: float = _same(1.0, "largest global norm of the gradient; 0: not clipped")
  steps: int = _free(
    2000, "updates in total, those before a resume included; another number bends the cosine anew"
  )

  mesh: str = _free(
    "stage:4",
    "devices along each axis, such as stage:4,data:2: stage, data, fsdp, expert, sequence, tensor;"
    " one may be -1, all that the others leave",
  )
  slow_axis: str = _free(
    "", "axis that lies between hosts or TPU slices: stage or data; default: any"
  )
  sequence_parallel: bool = _free(
    False, "cut positions over the mesh's tensor axis too, outside of matmuls"
  )
  ulysses: int = _free(
    1, "devices along sequence that exchange heads for positions; the others form a ring"
  )
  expert_axes: str = _free("expert", "mesh axes over which experts lie, such as sequence,expert")
  logits_chunk: int = _free(0, "positions whose logits live at once; 0: all of a microbatch's")
  schedule: str = _free(
    "1f1b",
    "pipeline schedule, from python -m jaxpipe.schedules --list; auto: the fastest by estimate that"
    " a device holds, or one as fast that holds less",
  )
  memory_limit: float = _free(
    0.0, "GB (1e9 bytes) of a device that --schedule=auto may plan with; 0: all that it says it has"
  )
  chunks: int = _free(0, "stages V that each device holds; 0: the schedule's own number")
  microbatches: int = _free(4, "microbatches M of a step")
  backward: str = _free("", "fused, split or deferred; default: the schedule's own")
  recompute: bool = _free(False, "recompute as an action of its own, which the schedule places")
  head: str = _free(
    "last", "last: the last stage has the head; sharded: every device a share, and of the embedding"
  )
  residuals: str = _free(
    "dots",
    "what forwards keep for backwards: dots, selective, all, full, a policy of"
    " jax.checkpoint_policies such as"
    " nothing_saveable, or names:A,B, such as names:attention,mlp_up",
  )
  unroll: str = _free("auto", "program shape: none, one loop; ends; all, one straight line; auto")
  slack: int = _free(0, "ticks that a transfer may take beyond its own, to run beside other work")

  run_dir: str = _free("runs/lm", "folder of checkpoints, metrics and plots; resumed if it is ours")
  checkpoint_every: int = _free(500, "steps between checkpoints; 0: only at the end")
  validate_every: int = _free(500, "steps between validations; 0: only at the end")
  profile_steps: str = _free("", "START:STOP, steps traced for Perfetto into the run directory")
  compilation_cache: str = _free("", "folder of compiled programs; default: in the user's cache")

  dry_run: bool = _free(False, "print what the run would cost, from its compiled step, and stop")
  sample: bool = _free(False, "only print text from the run in --run_dir; trains nothing")
  prompt: str = _free("\n", "how the sample begins")
  sample_length: int = _free(400, "tokens of the sample; 0: none")
  temperature: float = _free(0.8, "of sampling; 0 takes the likeliest token")

  def __post_init__(self) -> None:
    # Written so that a NaN is refused as well.
    for name in _AT_LEAST_ONE:
      self._check(name, getattr(self, name) >= 1, "is not a count; use 1 or more")
    for name in _AT_LEAST_ZERO:
      self._check(name, getattr(self, name) >= 0, "is negative or no number; use 0 or more")
    for name in ("learning_rate", "weight_decay", "clip_norm", "temperature", "memory_limit"):
      self._check(name, math.isfinite(getattr(self, name)), "is not finite; use a number")
    self._check("dropout", 0 <= self.dropout < 1, "is no rate; use 0 or more, below 1")
    self._check("dtype", self.dtype in DTYPES, f"is unknown; use {' or '.join(DTYPES)}")
    for name in ("norm", "bias", "positions"):
      self._check(name, getattr(self, name) in CHOICES[name], f"is none of {_listed(name)}")
    fraction = self.validation_fraction
    self._check("validation_fraction", 0 < fraction < 1, "is no share; use more than 0, below 1")
    self._check("seed", 0 <= self.seed < 2**32, "is no seed; use 0 to 4294967295")
    good = self.prompt.isascii() or self.prompt.encode("utf-8", "ignore").decode() == self.prompt
    self._check("prompt", good, "is not UTF-8; write it in UTF-8")
    shapes = ("auto", *SHAPES)
    self._check("unroll", self.unroll in shapes, f"is unknown; use {', '.join(shapes)}")
    self._check("slack", self.slack in (0, 1), "ticks cannot be executed; use 0 or 1")
    with naming(self.flag("residuals")):
      residual_policy(self.residuals)
    if self.head == "sharded":
      for name in ("experts", "logits_chunk"):
        message = "cannot be combined with --head=sharded; use --head=last, or leave it out"
        self._check(name, not getattr(self, name), message)
    if self.schedule == AUTO:
      for name, free in (("chunks", 0), ("backward", ""), ("recompute", False), ("head", "last")):
        message = f"is for a schedule by name, --schedule=auto decides it; leave --{name} out"
        self._check(name, getattr(self, name) == free, message)
    slow = self.slow_axis in ("", *SLOW)
    self._check("slow_axis", slow, f"cannot lie between hosts; use {' or '.join(SLOW)}")
    self._moe()  # raises for what is impossible
    self._rope_scaling()
    self.completep()
    self._check("run_dir", bool(self.run_dir), "names no folder; use --run_dir=runs/NAME")
    self.profile_range()

  def _check(self, name: str, good: bool, message: str) -> None:
    if not good:
      raise ConfigError(f"{self.flag(name)} {message}")

  def flag(self, name: str) -> str:
    """The field as one would type it: `--layers=4`."""
    return show_flag(name, getattr(self, name))

  def flags(self, *names: str) -> tuple[str, ...]:
    """Several fields as one would type them."""
    return tuple(self.flag(name) for name in names)

  def model(self, vocabulary_size: int) -> TransformerConfig:
    """Returns the model's own configuration.

    Args:
      vocabulary_size: ids of the tokenizer.

    Raises:
      ConfigError: widths and heads that do not fit each other, or fewer rows of the tables than
        ids; names the flags.
    """
    enough = not self.vocabulary_size or self.vocabulary_size >= vocabulary_size
    ids = f"is too small for the tokenizer's {vocabulary_size} ids; use {vocabulary_size} or more"
    self._check("vocabulary_size", enough, ids)
    moe, scaling = self._moe(), self._rope_scaling()
    learned = self.positions == "learned"
    shape = {name: getattr(self, name) for name in _SHAPE}
    shape["vocabulary_size"] = self.vocabulary_size or vocabulary_size
    shape["max_positions"] = self.max_positions or learned * self.sequence_length
    # The model knows widths and heads, but not what the flags are called.
    optional = [name for name in ("head_width", "bias") if getattr(self, name) not in (0, "none")]
    with naming(*self.flags("width", "heads", "kv_heads", "mlp", *optional)):
      return TransformerConfig(
        **shape,
        rope_scaling=scaling,
        completep=self.completep(),
        dropout=self.dropout,
        dtype=jnp.dtype(self.dtype),
        positions_cut=self.sequence_parallel,
        ulysses=self.ulysses,
        logits_chunk=self.logits_chunk,
        moe=moe,
      )

  def completep(self) -> CompleteP | None:
    """How the model differs from `--completep_base`."""
    base = self.completep_base
    for name in ("experts", "init_from"):
      self._check(
        name, not (base and getattr(self, name)), "has no --completep_base; leave one of them out"
      )
    with naming(self.flag("completep_base")):
      return CompleteP.parse(base, self.width, self.layers) if base else None

  def _rope_scaling(self) -> RopeScaling | None:
    with naming(self.flag("rope_scaling")):
      return RopeScaling.parse(self.rope_scaling) if self.rope_scaling else None

  def _moe(self) -> MoeConfig | None:
    """The experts, if there are any."""
    if not self.experts:
      self._check("expert_axes", self.expert_axes == "expert", "is for --experts; give them, too")
      return None
    with naming(*self.flags("experts", "top_k", "capacity_factor", "expert_axes")):
      return MoeConfig(
        experts=self.experts,
        top_k=self.top_k,
        capacity_factor=self.capacity_factor,
        group=self.capacity_group,
        balance=self.balance_loss,
        z=self.router_z_loss,
        shared=self.shared_width,
        axes=tuple(filter(None, self.expert_axes.split(","))),
      )

  def profile_range(self) -> range:
    """Steps to trace, from `--profile_steps=START:STOP`; empty where none are."""
    if not self.profile_steps:
      return range(0)
    start, _, stop = self.profile_steps.partition(":")
    good = start.isdecimal() and stop.isdecimal() and int(start) < int(stop)
    self._check("profile_steps", good, "is not START:STOP with START below STOP; use 10:13")
    inside = int(start) < self.steps
    self._check("profile_steps", inside, f"begins after --steps={self.steps}; begin before")
    return range(int(start), int(stop))

  def to_dict(self) -> dict[str, Any]:
    """The fields as JSON holds them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> Config:
    """Reads `to_dict` back; fields that this version does not know raise TypeError."""
    return cls(**fields)


# Fields that the model's configuration has by the same name.
_SHAPE = (
  *("vocabulary_size", "layers", "width", "heads", "kv_heads", "head_width", "mlp", "mlp_width"),
  *("norm", "norm_epsilon", "qk_norm", "bias", "positions", "max_positions", "rope_base", "tied"),
)
_AT_LEAST_ONE = (
  *("layers", "width", "heads", "kv_heads", "batch_size", "sequence_length"),
  *("steps", "microbatches", "top_k", "ulysses"),
)
_AT_LEAST_ZERO = (
  *("vocabulary_size", "head_width", "norm_epsilon", "max_positions", "rope_base"),
  *("mlp_width", "learning_rate", "warmup_steps", "weight_decay", "clip_norm", "chunks"),
  *("checkpoint_every", "validate_every", "sample_length", "temperature", "memory_limit"),
  *("experts", "capacity_factor", "capacity_group", "shared_width", "balance_loss"),
  *("router_z_loss", "logits_chunk"),
)


def shape_flags(model: TransformerConfig) -> dict[str, Any]:
  """The flags that give a model's shape: what `Config.model` makes of them has it."""
  flags = {name: getattr(model, name) for name in _SHAPE}
  flags |= {"rope_scaling": str(model.rope_scaling or ""), "experts": 0}
  if model.moe:
    flags |= {
      "experts": model.moe.experts,
      "top_k": model.moe.top_k,
      "capacity_factor": model.moe.capacity_factor,
      "capacity_group": model.moe.group,
      "shared_width": model.moe.shared,
      "balance_loss": model.moe.balance,
      "router_z_loss": model.moe.z,
    }
  return flags


def _listed(name: str) -> str:
  return ", ".join(CHOICES[name])


def show_flag(name: str, value: Any) -> str:
  """A flag as one would type it, on one line."""
  if isinstance(value, bool):
    return f"--{'' if value else 'no'}{name}"
  # A prompt may hold a line break, and an error is one line.
  text = str(value)
  return f"--{name}={text if text.isprintable() else json.dumps(text)}"


def must_match(name: str) -> bool:
  """Whether a resumed run must repeat this field."""
  fields = {field.name: field for field in dataclasses.fields(Config)}
  return not fields[name].metadata["may_change"]
