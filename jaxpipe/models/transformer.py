"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Dims: B batch rows, T positions, D model width, N query heads, K key/value heads, H head width,
F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.models.context import Context
from jaxpipe.models.stack import LayerStack
from jaxpipe.models.tables import Tables

Attention = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape and arithmetic of the model.

  Attributes:
    vocabulary_size: V.
    layers: number of layers.
    width: D.
    heads: N; D / N is the head width H, which must be even (rotary positions pair its elements).
    kv_heads: K, a divisor of N; N itself gives plain multi-head attention.
    mlp: `swiglu` or `gelu`.
    mlp_width: F; 0 takes 4 D for `gelu` and 8 D / 3, rounded up to a multiple of 32, for `swiglu`.
    dropout: rate after attention and after the MLP.
    tied: whether the head multiplies by the embedding's own table.
    dtype: of the arithmetic; losses and softmaxes are float32 at least.
    param_dtype: of the parameters.
    attention: `(query [B,T,N,H], key [B,T,K,H], value [B,T,K,H], is_causal=True) -> [B,T,N,H]`.
      The default softmaxes in float32 whatever its inputs, so a float64 oracle gives its own.
    rope_base: base of the rotary frequencies.

  Raises:
    ValueError: shapes that do not divide, or an unknown `mlp`.
  """

  vocabulary_size: int
  layers: int
  width: int
  heads: int
  kv_heads: int
  mlp: str = "swiglu"
  mlp_width: int = 0
  dropout: float = 0.0
  tied: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  attention: Attention = jax.nn.dot_product_attention
  rope_base: float = 10_000.0

  def __post_init__(self) -> None:
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ValueError(
        f"width {self.width} over {self.heads} heads does not give an even head width;"
        f" use a multiple of {2 * self.heads}"
      )
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.kv_heads} kv_heads do not divide {self.heads} heads; use a divisor")
    if self.mlp not in ("swiglu", "gelu"):
      raise ValueError(f"mlp {self.mlp!r} is unknown; use swiglu or gelu")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout {self.dropout} is not in [0, 1)")

  @property
  def head_width(self) -> int:
    """H."""
    return self.width // self.heads

  @property
  def hidden(self) -> int:
    """F."""
    wide = -(-8 * self.width // 3 // 32) * 32 if self.mlp == "swiglu" else 4 * self.width
    return self.mlp_width or wide


class Embed(nnx.Module):
  """`batch["tokens"]` int [B, T] -> x [B, T, D]."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.dtype = config.dtype
    shape = (config.vocabulary_size, config.width)
    self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, config.param_dtype))

  def __call__(self, batch: Any) -> jax.Array:
    return self.enter(jnp.take(self.table[...], self.ids(batch), axis=0), batch)

  def ids(self, batch: Any) -> jax.Array:
    """Rows of the table, [B, T]."""
    tokens: jax.Array = batch["tokens"]
    return tokens

  def enter(self, rows_BTD: jax.Array, batch: Any) -> jax.Array:
    """x, of the rows that were looked up."""
    return rows_BTD.astype(self.dtype)


class Layer(nnx.Module):
  """Pre-norm attention and MLP, each added to its input.

  What a residual policy can keep by name: `query` and `key` (rotated), `value`, `attention` (the
  values mixed), `attention_out`, `mlp_up`, and with `swiglu` `mlp_gate`.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config = config
    out = 0.02 / (2 * config.layers) ** 0.5  # keeps the residual stream's scale at any depth
    D, H = config.width, config.head_width
    self.attention_norm = _norm(config, rngs)
    self.query = _linear(config, D, config.heads * H, rngs)
    self.key = _linear(config, D, config.kv_heads * H, rngs)
    self.value = _linear(config, D, config.kv_heads * H, rngs)
    self.attention_out = _linear(config, config.heads * H, D, rngs, out)
    self.mlp_norm = _norm(config, rngs)
    self.up = _linear(config, D, config.hidden, rngs)
    if config.mlp == "swiglu":
      self.gate = _linear(config, D, config.hidden, rngs)
    self.down = _linear(config, config.hidden, D, rngs, out)

  def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
    rate = self.config.dropout
    x_BTD = x_BTD + context.dropout(self.attend(self.attention_norm(x_BTD)), rate)
    return x_BTD + context.dropout(self.mix(self.mlp_norm(x_BTD)), rate)

  def attend(self, x_BTD: jax.Array) -> jax.Array:
    """Causal attention over the row."""
    B, T, _ = x_BTD.shape
    query = self.query(x_BTD).reshape(B, T, self.config.heads, -1)
    key = self.key(x_BTD).reshape(B, T, self.config.kv_heads, -1)
    value = self.value(x_BTD).reshape(B, T, self.config.kv_heads, -1)
    query, key = rotate(query, self.config.rope_base), rotate(key, self.config.rope_base)
    query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
    value = checkpoint_name(value, "value")
    mixed = self.config.attention(query, key, value, is_causal=True)
    mixed = checkpoint_name(mixed.reshape(B, T, -1), "attention")
    return checkpoint_name(self.attention_out(mixed), "attention_out")

  def mix(self, x_BTD: jax.Array) -> jax.Array:
    """The MLP."""
    up = checkpoint_name(self.up(x_BTD), "mlp_up")
    if self.config.mlp == "gelu":
      return self.down(nnx.gelu(up))
    gate = checkpoint_name(self.gate(x_BTD), "mlp_gate")
    return self.down(nnx.silu(gate) * up)


class Head(nnx.Module):
  """x -> summed cross-entropy (nats), number of targets, metrics.

  Reads `batch["targets"]` int [B, T] and `batch["weights"]` float [B, T], 0 where there is padding.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.norm = _norm(config, rngs)
    self.dtype = config.dtype
    shape = (config.vocabulary_size, config.width)
    self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, config.param_dtype))

  def __call__(self, x_BTD: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    logits_BTV = self.logits(x_BTD)
    targets_BT, weights_BT = self.targets(batch)
    weights_BT = weights_BT.astype(logits_BTV.dtype)
    top_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    own_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    right_BT = (jnp.argmax(logits_BTV, axis=-1) == targets_BT).astype(logits_BTV.dtype)
    loss_sum = jnp.sum((top_BT - own_BT) * weights_BT)
    return loss_sum, jnp.sum(weights_BT), {"correct": jnp.sum(right_BT * weights_BT)}

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Returns logits [B, T, V], float32 at least."""
    table_VD = self.table[...].astype(self.dtype)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    return jnp.einsum(
      "BTD,VD->BTV", self.features(x_BTD, None), table_VD, preferred_element_type=wide
    )

  def features(self, x_BTD: jax.Array, batch: Any) -> jax.Array:
    """What the table multiplies, [B, T, D]."""
    return self.norm(x_BTD)

  def targets(self, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Targets int [B, T] and their weights [B, T]."""
    return batch["targets"], batch["weights"]


def rotate(x_BTNH: jax.Array, base: float) -> jax.Array:
  """Rotary positions (RoFormer, arXiv 2104.09864): turns pair (h, h + H/2) by t * base^(-2h/H)."""
  T, H = x_BTNH.shape[1], x_BTNH.shape[3]
  wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
  frequency = base ** (-jnp.arange(0, H, 2, dtype=wide) / H)
  angle_T1h = (jnp.arange(T, dtype=wide)[:, None] * frequency[None, :])[None, :, None, :]
  sin, cos = jnp.sin(angle_T1h).astype(x_BTNH.dtype), jnp.cos(angle_T1h).astype(x_BTNH.dtype)
  a, b = jnp.split(x_BTNH, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def transformer(config: TransformerConfig) -> LayerStack:
  """Returns the model as a stack that the pipeline can cut."""
  layer = lambda rngs: Layer(config, rngs)  # noqa: E731 - one object, so that layers are one kind
  return LayerStack(
    embed=lambda rngs: Embed(config, rngs),
    layers=[layer] * config.layers,
    head=lambda rngs: Head(config, rngs),
    tied={"table": "table"} if config.tied else {},
    vocabulary=Tables(embed="table", head="table"),
  )


def flops_per_token(config: TransformerConfig, sequence_length: int) -> int:
  """Model FLOPs of one training token, forward and backward, nothing recomputed.

  6 per weight that multiplies (the embedding only looks up), and 12 * D * T per layer for scores
  and mixing, as PaLM counts them (arXiv 2204.02311, appendix B).
  """
  D, H, F = config.width, config.head_width, config.hidden
  attention = D * H * (2 * config.heads + 2 * config.kv_heads)
  mlp = (3 if config.mlp == "swiglu" else 2) * D * F
  weights = config.layers * (attention + mlp) + config.vocabulary_size * D
  return 6 * weights + 12 * config.layers * D * sequence_length


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(config.width, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)


def _linear(
  config: TransformerConfig, fan_in: int, out: int, rngs: nnx.Rngs, scale: float = 0.02
) -> nnx.Linear:
  return nnx.Linear(
    fan_in,
    out,
    use_bias=False,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nnx.initializers.normal(scale),
    rngs=rngs,
  )
