"""The flags of a language-model run, besides those that every run has (`run_config.py`).

A resumed run need not name the same text file and tokenizer: these are compared by what they hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxpipe.models.transformer.adapters import Lora, trained
from jaxpipe.models.transformer.completep import CompleteP
from jaxpipe.models.transformer.config import CHOICES, TransformerConfig
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.models.transformer.rotary import RopeScaling
from jaxpipe.training.flags.errors import naming
from jaxpipe.training.flags.run_config import AUTO, RUN_DIR, RunConfig
from jaxpipe.training.flags.settings import free as _free
from jaxpipe.training.flags.settings import same as _same

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """The flags of a language-model run: its model, text, parallelism and sampling.

  Each field is a flag, and its help text says what it means.

  Raises:
    ConfigError: a value that is impossible whatever the others are.
  """

  preset: str = _free(
    "", "shape of a known model, such as gpt2 or qwen3-0.6b; flags given override"
  )
  init_from: str = _free(
    "", "folder with config.json and *.safetensors: begins from its weights, and takes its shape"
  )
  lora_rank: int = _same(
    0,
    "rank of adapters (LoRA) beside the matrices of attention and MLPs, which alone train; experts"
    " have none; 0: none",
  )
  lora_alpha: float = _same(
    0.0, "adapters are multiplied by this over their rank; 0: twice the rank"
  )
  freeze: str = _same(
    "",
    "regular expression of parameters that do not train, such as 'embed/.*|layers/[01]/.*'; all"
    " others do, and adapters always; default: none, and with --lora_rank all but the adapters",
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
  sequence_length: int = _same(128, "tokens T of a row")

  completep_base: str = _same(
    "", "WIDTHxLAYERS of a model that the rates were found on, scaled from there by CompleteP; none"
  )
  sequence_parallel: bool = _free(
    False, "cut positions over the mesh's tensor axis too, outside of matmuls"
  )
  ulysses: int = _free(
    1, "devices along sequence that exchange heads for positions; the others form a ring"
  )
  expert_axes: str = _free("expert", "mesh axes over which experts lie, such as sequence,expert")
  logits_chunk: int = _free(0, "positions whose logits live at once; 0: all of a microbatch's")
  head: str = _free(
    "last", "last: the last stage has the head; sharded: every device a share, and of the embedding"
  )

  run_dir: str = _free("runs/lm", RUN_DIR)
  sample: bool = _free(False, "only print text from the run in --run_dir; trains nothing")
  prompt: str = _free("\n", "how the sample begins")
  sample_length: int = _free(400, "tokens of the sample; 0: none")
  temperature: float = _free(0.8, "of sampling; 0 takes the likeliest token")

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_counts("layers", "width", "heads", "kv_heads", "sequence_length")
    self._check_counts("top_k", "ulysses")
    self._check_amounts("vocabulary_size", "head_width", "norm_epsilon", "max_positions")
    self._check_amounts("rope_base", "mlp_width", "sample_length", "temperature")
    self._check_amounts("experts", "capacity_factor", "capacity_group", "shared_width")
    self._check_amounts("balance_loss", "router_z_loss", "logits_chunk")
    self._check_amounts("lora_rank", "lora_alpha")
    alone = bool(self.lora_rank) or not self.lora_alpha
    self._check("lora_alpha", alone, "scales adapters, and there are none; give --lora_rank, too")
    with naming(self.flag("freeze")):
      trained(None, self.freeze, {})
    self._check("dropout", 0 <= self.dropout < 1, "is no rate; use 0 or more, below 1")
    self._check("dtype", self.dtype in DTYPES, f"is unknown; use {' or '.join(DTYPES)}")
    for name in ("norm", "bias", "positions"):
      self._check(name, getattr(self, name) in CHOICES[name], f"is none of {_listed(name)}")
    fraction = self.validation_fraction
    self._check("validation_fraction", 0 < fraction < 1, "is no share; use more than 0, below 1")
    good = self.prompt.isascii() or self.prompt.encode("utf-8", "ignore").decode() == self.prompt
    self._check("prompt", good, "is not UTF-8; write it in UTF-8")
    if self.head == "sharded":
      for name in ("experts", "logits_chunk"):
        message = "cannot be combined with --head=sharded; use --head=last, or leave it out"
        self._check(name, not getattr(self, name), message)
    if self.schedule == AUTO:
      self._check_by_name_only("head", "last")
    # Each raises for what is impossible: now, and not when the model is built.
    self._moe()
    self._rope_scaling()
    self.completep()

  def model(self, vocabulary_size: int) -> TransformerConfig:
    """Returns the configuration of the model that the flags describe.

    Args:
      vocabulary_size: number of the tokenizer's ids.

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
        lora=self.lora(),
      )

  def completep(self) -> CompleteP | None:
    """The factors by which the model is larger than `--completep_base`; None without that flag."""
    base = self.completep_base
    other = base and self.optimizer != "adamw"
    self._check("optimizer", not other, "has no --completep_base, whose rules are for adamw")
    for name in ("experts", "init_from", "lora_rank"):
      self._check(
        name, not (base and getattr(self, name)), "has no --completep_base; leave one of them out"
      )
    with naming(self.flag("completep_base")):
      return CompleteP.parse(base, self.width, self.layers) if base else None

  def lora(self) -> Lora | None:
    """The adapters beside the layers' matrices; None without `--lora_rank`."""
    rank = self.lora_rank
    return Lora(rank, self.lora_alpha or 2.0 * rank) if rank else None

  def _rope_scaling(self) -> RopeScaling | None:
    with naming(self.flag("rope_scaling")):
      return RopeScaling.parse(self.rope_scaling) if self.rope_scaling else None

  def _moe(self) -> MoeConfig | None:
    """The configuration of the mixture of experts; None for a model with plain MLPs."""
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


# Fields that the model's configuration has by the same name.
_SHAPE = (
  *("vocabulary_size", "layers", "width", "heads", "kv_heads", "head_width", "mlp", "mlp_width"),
  *("norm", "norm_epsilon", "qk_norm", "bias", "positions", "max_positions", "rope_base", "tied"),
)


def shape_flags(model: TransformerConfig) -> dict[str, Any]:
  """Returns the flags, by name, of which `Config.model` makes a model of this shape."""
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
