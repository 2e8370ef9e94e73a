"""Shape and arithmetic of a decoder-only transformer, as one frozen value.

The defaults are Llama's (Touvron et al., arXiv 2302.13971): RMSNorm, SwiGLU, rotary positions, no
biases. With other values it is GPT-2, Qwen2, Qwen3 or Mixtral (see `presets`). Where one choice
excludes another, the configuration is refused when it is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.models.transformer.adapters import Lora
from jaxpipe.models.transformer.completep import CompleteP
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.models.transformer.rotary import RopeScaling

Attention = Callable[..., jax.Array]

# Field -> the values that it may have, for the fields that choose among a few.
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
    vocabulary_size: V, number of tokens of the vocabulary, which is the number of rows of the
      embedding's table and of the head's.
    layers: number of layers.
    width: D, width of the residual stream.
    heads: N, number of query heads.
    kv_heads: K, number of key/value heads, a divisor of N; N itself gives plain multi-head
      attention.
    head_width: H, width of a head; 0 takes D / N. Rotary positions pair its elements, so that it
      must be even.
    mlp: kind of MLP, `swiglu` or `gelu` (by tanh, as GPT-2's).
    mlp_width: F, hidden width of the MLP, or of each expert; 0 takes 4 D for `gelu` and 8 D / 3,
      rounded up to a multiple of 32, for `swiglu`.
    norm: kind of norm, `rmsnorm`, or `layernorm` with a scale and a bias.
    norm_epsilon: number that the norms add to the mean square before they divide by its root.
    qk_norm: whether queries and keys are normed, each head by itself, before they are rotated.
    bias: matrices that have a bias: `none`; `qkv`, those of queries, keys and values; or `all`, of
      attention and MLP. The head has none.
    positions: kind of positions, `rotary`, or `learned`, a table that is added to the tokens' own.
    max_positions: rows of the table of learned positions. With rotary positions nothing is limited
      by it: it is the context that a checkpoint names, 0 where none does.
    rope_base: base of the rotary frequencies.
    rope_scaling: how rotary frequencies are slowed for contexts longer than those of the first
      training; None: not at all.
    dropout: dropout rate of what attention and the MLP add to the residual stream, in [0, 1).
    tied: whether the head multiplies by the embedding's own table.
    dtype: dtype of the arithmetic; losses and softmaxes are float32 at least.
    param_dtype: dtype of the parameters.
    attention: attention of whole rows, called as
      `(query [B,T,N,H], key [B,T,K,H], value [B,T,K,H], is_causal=True) -> [B,T,N,H]`. The default
      computes softmaxes in float32 whatever its inputs; a float64 oracle gives a function of its
      own.
    positions_cut: whether activations between attention and MLP are cut over `tensor` by positions
      (sequence parallelism: Korthikanti et al., arXiv 2205.05198). As many bytes are sent; norms,
      dropouts and what travels between stages are divided by `tensor` too.
    ulysses: number of devices along `sequence` that exchange heads for positions with each other;
      groups of so many exchange keys and values. 1: every device is a group.
    logits_chunk: number of positions of a microbatch's rows whose logits are in memory at once; 0:
      all positions.
    moe: a mixture of gated experts of hidden width F in place of every layer's MLP; None: no
      experts.
    completep: how this model differs in width and depth from a base model whose learning rate it
      shall share; None: initial values and branches are not scaled.
    lora: low-rank adapters beside the layers' matrices; None: there are none.

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
  lora: Lora | None = None

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
    if self.lora and self.completep:
      raise ValueError("completep with adapters: it has no rules for them; leave one out")
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
    """Raises ValueError for heads that do not divide, or whose width has no pairs to rotate."""
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
    """Width of a head, as it was given or D / N."""
    return self.head_width or self.width // self.heads

  @property
  def hidden(self) -> int:
    """F, hidden width of the MLP or of each expert, as it was given or by the kind of MLP."""
    wide = -(-8 * self.width // 3 // 32) * 32 if self.mlp == "swiglu" else 4 * self.width
    return self.mlp_width or wide


def flops_per_token(config: TransformerConfig, sequence_length: int) -> int:
  """Returns the model FLOPs of one training token, forward and backward, nothing recomputed.

  6 for each weight that multiplies (the embedding only looks up), and 12 * N * H * T for each
  layer's scores and mixing, as PaLM counts them (arXiv 2204.02311, appendix B). Of experts only
  those that a token visits count.

  Args:
    config: of the model.
    sequence_length: T, positions of a row.
  """
  D, H, F = config.width, config.H, config.hidden
  attention = D * H * (2 * config.heads + 2 * config.kv_heads)
  mlp = (3 if config.mlp == "swiglu" else 2) * D * F
  if config.moe:
    mlp = 3 * D * (config.moe.top_k * F + config.moe.shared) + D * config.moe.experts
  weights = config.layers * (attention + mlp) + config.vocabulary_size * D
  return 6 * weights + 12 * config.layers * config.heads * H * sequence_length
