"""A transformer's configuration from Hugging Face's config.json, and back.

A field that asks for what this transformer lacks is refused by name, never left out: a model that
is slightly another one would give slightly wrong numbers, and no error.

References:
  The fields of each kind of model: the configuration classes of huggingface.co/docs/transformers.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.models.transformer.rotary import RopeScaling

Fields = Mapping[str, Any]

_ARCHITECTURES = {
  "gpt2": "GPT2LMHeadModel",
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "mixtral": "MixtralForCausalLM",
}
# Conditions under which this transformer is the model that a file describes, by kind of model. Each
# is a field, its default where it is missing, and the values that this transformer can follow.
_GATED: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
  ("hidden_act", "silu", ("silu",)),
  ("use_sliding_window", False, (False, None)),
)
_NEEDED = {
  "gpt2": (
    ("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    ("scale_attn_weights", True, (True,)),
    ("scale_attn_by_inverse_layer_idx", False, (False,)),
    ("add_cross_attention", False, (False,)),
  ),
  "llama": _GATED,
  "qwen2": _GATED,
  "qwen3": (*_GATED, ("attention_bias", False, (False,))),
  "mixtral": (*_GATED, ("sliding_window", None, (None,))),
}


def read_config(folder: str | os.PathLike[str]) -> TransformerConfig:
  """Reads the configuration of a folder's model.

  Args:
    folder: holds config.json.

  Returns:
    The configuration, its arithmetic and its parameters in float32.

  Raises:
    ValueError: no such file, a model of another kind, or one with what the transformer lacks.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.is_file():
    raise ValueError(f"{path}: not found; give a folder with config.json and *.safetensors")
  try:
    fields = json.loads(path.read_text())
    kind = fields.get("model_type")
    if kind not in _ARCHITECTURES:
      raise ValueError(f"model_type {kind!r} is none of {', '.join(_ARCHITECTURES)}")
    for name, default, known in _NEEDED[kind]:
      if fields.get(name, default) not in known:
        raise ValueError(f"{name} {fields[name]!r} is not supported, only {known[0]!r}")
    return _gpt2(fields) if kind == "gpt2" else _gated(kind, fields)
  except KeyError as error:
    raise ValueError(f"{path}: has no {error}; a model's config.json does") from None
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: {error}") from None


def _gpt2(fields: Fields) -> TransformerConfig:
  """The configuration of a GPT-2 from the fields of its file."""
  return TransformerConfig(
    vocabulary_size=fields["vocab_size"],
    layers=fields["n_layer"],
    width=fields["n_embd"],
    heads=fields["n_head"],
    kv_heads=fields["n_head"],
    mlp="gelu",
    mlp_width=fields.get("n_inner") or 4 * fields["n_embd"],
    norm="layernorm",
    norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
    bias="all",
    positions="learned",
    max_positions=fields["n_positions"],
    tied=fields.get("tie_word_embeddings", True),
  )


def _gated(kind: str, fields: Fields) -> TransformerConfig:
  """The configuration of a model with a gated MLP from its fields: all kinds but GPT-2."""
  layer_types = set(fields.get("layer_types") or ()) - {"full_attention"}
  if layer_types:
    raise ValueError(f"layer_types {sorted(layer_types)} are not supported, only full_attention")
  heads, width = fields["num_attention_heads"], fields["hidden_size"]
  head_width = fields.get("head_dim") or (128 if kind == "qwen3" else width // heads)
  base, scaling = _rope(fields, 1e6 if kind == "mixtral" else 1e4)
  return TransformerConfig(
    vocabulary_size=fields["vocab_size"],
    layers=fields["num_hidden_layers"],
    width=width,
    heads=heads,
    kv_heads=fields.get("num_key_value_heads") or heads,
    head_width=0 if head_width * heads == width else head_width,
    mlp_width=fields["intermediate_size"],
    norm_epsilon=fields.get("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6),
    qk_norm=kind == "qwen3",
    bias=_bias(kind, fields),
    max_positions=fields.get("max_position_embeddings", 0),
    rope_base=base,
    rope_scaling=scaling,
    tied=fields.get("tie_word_embeddings", False),
    moe=_experts(fields) if kind == "mixtral" else None,
  )


def _bias(kind: str, fields: Fields) -> str:
  """Which matrices have a bias, in the words of `TransformerConfig.bias`."""
  # Qwen2 always has these, and no field that says so.
  if kind == "qwen2":
    return "qkv"
  attention, mlp = (bool(fields.get(f"{part}_bias", False)) for part in ("attention", "mlp"))
  if attention != mlp:
    raise ValueError(f"attention_bias {attention} with mlp_bias {mlp} is not supported, only alike")
  return "all" if attention else "none"


def _rope(fields: Fields, usual: float) -> tuple[float, RopeScaling | None]:
  """Base and scaling of rotary positions, by any of the names that have been in use for them.

  Args:
    fields: of the file.
    usual: base of the kind of model where the file names none.
  """
  parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  base = float(fields.get("rope_theta") or parameters.get("rope_theta") or usual)
  if kind == "default":
    return base, None
  if kind != "llama3":
    raise ValueError(f"rope_type {kind!r} is not supported, only default and llama3")
  return base, RopeScaling(
    factor=parameters["factor"],
    low=parameters["low_freq_factor"],
    high=parameters["high_freq_factor"],
    length=parameters["original_max_position_embeddings"],
  )


def _experts(fields: Fields) -> MoeConfig:
  """Mixtral's experts, without a capacity: no token is dropped."""
  return MoeConfig(
    experts=fields["num_local_experts"],
    top_k=fields["num_experts_per_tok"],
    capacity_factor=0,
    group=0,
    balance=fields.get("router_aux_loss_coef", 0.0),
    z=0.0,
  )


def kind_of(config: TransformerConfig) -> str:
  """Returns the `model_type` whose models have this configuration.

  Raises:
    ValueError: no kind of model that is supported has it.
  """
  c = config
  if c.completep:
    raise ValueError(
      "no model there scales branches and logits as CompleteP does; it cannot be exported"
    )
  gpt2 = dict(norm="layernorm", bias="all", positions="learned", mlp="gelu", qk_norm=False)
  if all(getattr(c, name) == value for name, value in gpt2.items()):
    if c.kv_heads == c.heads and c.H * c.heads == c.width:
      return "gpt2"
  elif c.norm == "rmsnorm" and c.positions == "rotary" and c.mlp == "swiglu":
    kinds = {("none", False): "llama", ("all", False): "llama", ("qkv", False): "qwen2"}
    kind = (kinds | {("none", True): "qwen3"}).get((c.bias, c.qk_norm))
    if kind and not c.moe:
      return kind
    # Mixtral's experts are gated by weights that sum to 1, and none is shared.
    if kind == "llama" and c.bias == "none" and c.moe and c.moe.normalize and not c.moe.shared:
      return "mixtral"
  raise ValueError(
    f"no model of {', '.join(_ARCHITECTURES)} has norm {c.norm!r}, bias {c.bias!r}, positions"
    f" {c.positions!r}, mlp {c.mlp!r}, qk_norm {c.qk_norm}, {c.kv_heads} of {c.heads} heads and"
    f" {'such experts' if c.moe else 'no experts'} together; it cannot be exported"
  )


def to_json(config: TransformerConfig, length: int) -> dict[str, Any]:
  """Returns the fields of config.json for a configuration.

  Args:
    config: of the model.
    length: positions of the longest row, where the configuration does not say.

  Raises:
    ValueError: no kind of model that is supported has this configuration.
  """
  kind = kind_of(config)
  fields: dict[str, Any] = {
    "architectures": [_ARCHITECTURES[kind]],
    "model_type": kind,
    "torch_dtype": np.dtype(config.param_dtype).name,
    "vocab_size": config.vocabulary_size,
    "tie_word_embeddings": config.tied,
  }
  length = config.max_positions or length
  return fields | (_gpt2_json(config) if kind == "gpt2" else _gated_json(kind, config, length))


def _gpt2_json(config: TransformerConfig) -> dict[str, Any]:
  """The fields of a GPT-2, beside those that all kinds have."""
  return {
    "activation_function": "gelu_new",
    "n_layer": config.layers,
    "n_embd": config.width,
    "n_head": config.heads,
    "n_inner": config.hidden,
    "n_positions": config.max_positions,
    "layer_norm_epsilon": config.norm_epsilon,
    # GPT-2's own are ids of its tokenizer, which this model's need not be.
    "bos_token_id": None,
    "eos_token_id": None,
  }


def _gated_json(kind: str, config: TransformerConfig, length: int) -> dict[str, Any]:
  """The fields of any other kind of model, beside those that all kinds have."""
  fields: dict[str, Any] = {
    "hidden_act": "silu",
    "num_hidden_layers": config.layers,
    "hidden_size": config.width,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.H,
    "intermediate_size": config.hidden,
    "max_position_embeddings": length,
    "rms_norm_eps": config.norm_epsilon,
    "rope_theta": config.rope_base,
    "rope_scaling": None,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  if config.rope_scaling:
    s = config.rope_scaling
    fields["rope_scaling"] = {
      "rope_type": "llama3",
      "factor": s.factor,
      "low_freq_factor": s.low,
      "high_freq_factor": s.high,
      "original_max_position_embeddings": s.length,
    }
  if kind == "llama":
    fields |= dict.fromkeys(("attention_bias", "mlp_bias"), config.bias == "all")
  if config.moe:
    fields |= {
      "num_local_experts": config.moe.experts,
      "num_experts_per_tok": config.moe.top_k,
      "router_aux_loss_coef": config.moe.balance,
      "sliding_window": None,
    }
  return fields
