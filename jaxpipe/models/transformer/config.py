"""Shape and arithmetic of a decoder-only transformer, as one frozen value.

The defaults are Llama's; with other values it is GPT-2, Qwen2 or Qwen3 (see `presets`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.models.transformer.completep import CompleteP
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.models.transformer.rotary import RopeScaling

Attention = Callable[..., jax.Array]

# Values of the fields that choose among a few.
CHOICES = {
  "mlp": ("swiglu", "gelu"),
  "norm": ("rmsnorm", "layernorm"),
  "positions": ("rotary", "learned"),
  "bias": ("none", "qkv", "all"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape and arithmetic of the model.

  Attributes:
    vocabulary_size: V.
    layers: number of layers.
    width: D.
    heads: N.
    kv_heads: K, a divisor of N; N itself gives plain multi-head attention.
    head_width: H; 0 takes D / N. Rotary positions pair its elements, so that it must be even.
    mlp: `swiglu` or `gelu` (by tanh, as GPT-2's).
    mlp_width: F; 0 takes 4 D for `gelu` and 8 D / 3, rounded up to a multiple of 32, for `swiglu`.
    norm: `rmsnorm`, or `layernorm` with a scale and a bias.
    norm_epsilon: what the norms add to the mean square.
    qk_norm: whether queries and keys are normed, each head by itself, before they are rotated.
    bias: matrices that have one: `none`; `qkv`, those of queries, keys and values; or `all`, of
      attention and MLP. The head has none.
    positions: `rotary`, or `learned`, a table that is added to the tokens' own.
    max_positions: rows of that table.
    rope_base: base of the rotary frequencies.
    rope_scaling: slows them for long contexts.
    dropout: rate after attention and after the MLP.
    tied: whether the head multiplies by the embedding's own table.
    dtype: of the arithmetic; losses and softmaxes are float32 at least.
    param_dtype: of the parameters.
    attention: `(query [B,T,N,H], key [B,T,K,H], value [B,T,K,H], is_causal=True) -> [B,T,N,H]`.
      The default softmaxes in float32 whatever its inputs, so a float64 oracle gives its own.
    positions_cut: whether activations between attention and MLP are cut over `tensor` by positions
      (sequence parallelism: Korthikanti et al., arXiv 2205.05198); the same bytes are sent, and
      norms, dropouts and what travels between stages are divided by `tensor` too.
    ulysses: of the devices along `sequence`, how many exchange heads for positions; the others
      exchange keys and values in a ring. 1: all in the ring.
    logits_chunk: positions whose logits live at once; 0: all of a microbatch's.
    moe: experts of width `mlp_width` in place of every layer's MLP, gated; None: no experts.
    completep: how it differs from a base model, so that both learn alike; None: it does not.

  Raises:
    ValueError: shapes that do not divide, or an unknown choice.
  """

  vocabulary_size: int
  layers: int
  width: int
  heads: int
  kv_heads: int
  head_width: int = 0
  mlp: str = "swiglu"
  mlp_width: int = 0
  norm: str = "rmsnorm"
  norm_epsilon: float = 1e-6
  qk_norm: bool = False
  bias: str = "none"
  positions: str = "rotary"
  max_positions: int = 0
  rope_base: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  dropout: float = 0.0
  tied: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  attention: Attention = jax.nn.dot_product_attention
  positions_cut: bool = False
  ulysses: int = 1
  logits_chunk: int = 0
  moe: MoeConfig | None = None
  completep: CompleteP | None = None

  def __post_init__(self) -> None:
    for name, known in CHOICES.items():
      if getattr(self, name) not in known:
        shown = " or ".join([", ".join(known[:-1]), known[-1]])
        raise ValueError(f"{name} {getattr(self, name)!r} is unknown; use {shown}")
    self._check_heads()
    if self.moe and self.mlp != "swiglu":
      raise ValueError(f"mlp {self.mlp!r} with experts: they are gated; use swiglu")
    if self.moe and self.bias == "all":
      raise ValueError("bias 'all' with experts: they have none; use qkv or none")
    if self.moe and self.completep:
      raise ValueError("completep with experts: it has no rules for them; leave one out")
    if self.positions == "learned" and self.max_positions < 1:
      raise ValueError(
        f"{self.max_positions} learned positions are none; use max_positions of the longest row"
      )
    if self.ulysses < 1 or self.logits_chunk < 0:
      raise ValueError(
        f"ulysses {self.ulysses} is to be 1 or more, and logits_chunk {self.logits_chunk} 0 or more"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout {self.dropout} is not in [0, 1)")

  def _check_heads(self) -> None:
    odd = self.positions == "rotary" and self.H % 2
    if self.head_width and odd:
      raise ValueError(f"head width {self.head_width} is odd; rotary positions take an even one")
    if not self.head_width and (self.width % self.heads or odd):
      raise ValueError(
        f"width {self.width} over {self.heads} heads does not give an even head width;"
        f" use a multiple of {2 * self.heads}"
      )
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.kv_heads} kv_heads do not divide {self.heads} heads; use a divisor")

  @property
  def H(self) -> int:
    """Width of a head."""
    return self.head_width or self.width // self.heads

  @property
  def hidden(self) -> int:
    """F."""
    wide = -(-8 * self.width // 3 // 32) * 32 if self.mlp == "swiglu" else 4 * self.width
    return self.mlp_width or wide


def flops_per_token(config: TransformerConfig, sequence_length: int) -> int:
  """Model FLOPs of one training token, forward and backward, nothing recomputed.

  6 per weight that multiplies (the embedding only looks up), and 12 * N * H * T per layer for
  scores and mixing, as PaLM counts them (arXiv 2204.02311, appendix B).
  """
  D, H, F = config.width, config.H, config.hidden
  attention = D * H * (2 * config.heads + 2 * config.kv_heads)
  mlp = (3 if config.mlp == "swiglu" else 2) * D * F
  if config.moe:
    mlp = 3 * D * (config.moe.top_k * F + config.moe.shared) + D * config.moe.experts
  weights = config.layers * (attention + mlp) + config.vocabulary_size * D
  return 6 * weights + 12 * config.layers * config.heads * H * sequence_length
