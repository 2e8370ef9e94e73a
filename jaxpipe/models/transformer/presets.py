"""Configurations of known models, by the name that a flag takes.

Shapes of checkpoints are those of their config.json, with the checkpoint's own number of parameters
(`tests/models/transformer/test_presets.py`). Shapes of papers have the paper's size, in this
transformer's own architecture.
"""

from __future__ import annotations

import difflib
from typing import Any

from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.models.transformer.rotary import RopeScaling


def _model(layers: int, width: int, heads: int, mlp_width: int, **more: Any) -> TransformerConfig:
  """A model with as many key/value heads as heads, unless `more` says otherwise."""
  shape = dict(layers=layers, width=width, heads=heads, mlp_width=mlp_width)
  return TransformerConfig(**{"kv_heads": heads, **shape, **more})


def _gpt2(layers: int, width: int, heads: int) -> TransformerConfig:
  """A model of Radford et al., Language Models are Unsupervised Multitask Learners, 2019."""
  return _model(
    layers,
    width,
    heads,
    4 * width,
    vocabulary_size=50257,
    mlp="gelu",
    norm="layernorm",
    norm_epsilon=1e-5,
    bias="all",
    positions="learned",
    max_positions=1024,
    tied=True,
  )


def _llama3(
  layers: int, width: int, heads: int, mlp_width: int, factor: float, **more: Any
) -> TransformerConfig:
  """A model of The Llama 3 herd of models, arXiv 2407.21783; versions 3.1 and 3.2."""
  return _model(
    layers,
    width,
    heads,
    mlp_width,
    vocabulary_size=128256,
    kv_heads=8,
    norm_epsilon=1e-5,
    max_positions=131072,
    rope_base=5e5,
    rope_scaling=RopeScaling(factor=factor, low=1, high=4, length=8192),
    **more,
  )


def _qwen2(
  layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, **more: Any
) -> TransformerConfig:
  """A model of the Qwen2.5 technical report, arXiv 2412.15115."""
  options: dict[str, Any] = dict(vocabulary_size=151936, max_positions=32768, tied=True)
  return _model(
    layers,
    width,
    heads,
    mlp_width,
    kv_heads=kv_heads,
    bias="qkv",
    rope_base=1e6,
    **{**options, **more},
  )


def _qwen3(
  layers: int, width: int, heads: int, mlp_width: int, tied: bool = True
) -> TransformerConfig:
  """A model of the Qwen3 technical report, arXiv 2505.09388."""
  return _model(
    layers,
    width,
    heads,
    mlp_width,
    vocabulary_size=151936,
    kv_heads=8,
    head_width=128,
    qk_norm=True,
    rope_base=1e6,
    max_positions=40960,
    tied=tied,
  )


def _moe(experts: int, top_k: int, balance: float, z: float, shared: int = 0) -> MoeConfig:
  """Experts without a capacity: no token is dropped."""
  return MoeConfig(
    experts=experts, top_k=top_k, capacity_factor=0, group=0, balance=balance, z=z, shared=shared
  )


PRESETS: dict[str, TransformerConfig] = {
  "tiny": _model(4, 64, 2, 256, vocabulary_size=256),
  "gpt2": _gpt2(12, 768, 12),
  "gpt2-medium": _gpt2(24, 1024, 16),
  "gpt2-large": _gpt2(36, 1280, 20),
  "gpt2-xl": _gpt2(48, 1600, 25),
  "llama-3.2-1b": _llama3(16, 2048, 32, 8192, factor=32, tied=True),
  "llama-3.2-3b": _llama3(28, 3072, 24, 8192, factor=32, tied=True),
  "llama-3.1-8b": _llama3(32, 4096, 32, 14336, factor=8),
  "llama-3.1-70b": _llama3(80, 8192, 64, 28672, factor=8),
  "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864),
  "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960, max_positions=131072),
  "qwen2.5-7b": _qwen2(
    28, 3584, 28, 4, 18944, vocabulary_size=152064, max_positions=131072, tied=False
  ),
  "qwen3-0.6b": _qwen3(28, 1024, 16, 3072),
  "qwen3-1.7b": _qwen3(28, 2048, 16, 6144),
  "qwen3-4b": _qwen3(36, 2560, 32, 9728),
  "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
  # Mixtral of Experts (arXiv 2401.04088): 12.9B of its parameters for a token.
  "mixtral-8x7b": _model(
    layers=32,
    width=4096,
    heads=32,
    mlp_width=14336,
    vocabulary_size=32000,
    kv_heads=8,
    norm_epsilon=1e-5,
    max_positions=32768,
    rope_base=1e6,
    moe=_moe(8, 2, balance=0.02, z=0.0),
  ),
  # Of the size of GPipe's 128-layer Transformer (arXiv 1811.06965): 50.3M parameters a layer.
  "gpipe-6b": _model(128, 2048, 16, 8192, vocabulary_size=32768, mlp="gelu"),
  # GPT-3 (arXiv 2005.14165, table 2.1); its 50,257 tokens padded to a multiple of 128.
  "gpt3-175b": _model(96, 12288, 96, 49152, vocabulary_size=50304, mlp="gelu", tied=True),
  # The largest of Megatron-LM's models (Narayanan et al., arXiv 2104.04473, table 1).
  "megatron-1t": _model(128, 25600, 160, 102400, vocabulary_size=51200, mlp="gelu"),
  # DeepSeek-V3 (arXiv 2412.19437): 256 experts and a shared one in each of 64 layers (61 there, the
  # first three without), grouped heads in place of its latent attention.
  "deepseek-v3": _model(
    layers=64,
    width=7168,
    heads=128,
    mlp_width=2048,
    vocabulary_size=129280,
    kv_heads=8,
    moe=_moe(256, 8, balance=0.0001, z=0.001, shared=2048),
  ),
}


def find_preset(name: str) -> TransformerConfig:
  """Returns the configuration that a name stands for.

  Raises:
    ValueError: the name is unknown; the message has the nearest one.
  """
  if name in PRESETS:
    return PRESETS[name]
  near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
  hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PRESETS)}"
  raise ValueError(f"{name!r} is unknown; {hint}")
