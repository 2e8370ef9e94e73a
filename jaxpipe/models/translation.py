"""An encoder-decoder Transformer as one stack: encoder layers, then decoder layers.

A pair of arrays travels from layer to layer, so that a pipeline can cut the stack anywhere:

    embed     source, tokens -> (encoded, decoded)
    encoder   encoded -> encoded; decoded passes by
    decoder   decoded, which looks at encoded -> decoded; encoded passes by
    head      decoded -> loss

Layers normalise their inputs (pre-norm; a decoder layer also normalises what it reads of the
encoder), and the head multiplies by the embedding's own table. Shapes are named as GPipe does,
T(L, H, A): L encoder and L decoder layers, H hidden units of each MLP, A attention heads.

References:
  Vaswani et al., Attention Is All You Need, arXiv:1706.03762: the model, its positions, label
  smoothing. Huang et al., GPipe, arXiv:1811.06965, section 5: T(L, H, A), one model for all pairs.

Dims: B batch rows, S source positions, T target positions, D model width, N heads, H head width,
V vocabulary; Q positions of the queries, K positions of the keys.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.tables import make_table, table_logits
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationConfig:
  """Shape and arithmetic of the model.

  Attributes:
    vocabulary_size: V, number of tokens of the vocabulary that source and target share.
    layers: L, number of layers of the encoder, and as many of the decoder.
    width: D, width of the residual streams; even, for positions are pairs of sine and cosine.
    hidden: hidden units of each MLP.
    heads: N, number of attention heads.
    head_width: H, width of a head; 0 takes D / N.
    dropout: dropout rate of what attention and MLP add to the streams, in [0, 1).
    label_smoothing: share of the target's probability that is spread over the vocabulary, in
      [0, 1).
    pad: id of padding in `batch["source"]`; no position attends to it.
    dtype: dtype of the arithmetic; losses and softmaxes are float32 at least.
    param_dtype: dtype of the parameters.

  Raises:
    ValueError: sizes below 1, shapes that do not divide, or rates outside [0, 1).
  """

  vocabulary_size: int
  layers: int
  width: int
  hidden: int
  heads: int
  head_width: int = 0
  dropout: float = 0.0
  label_smoothing: float = 0.1
  pad: int = 0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if min(self.vocabulary_size, self.layers, self.width, self.hidden, self.heads) < 1:
      raise ValueError(f"{self} has a size below 1; use 1 or more")
    if self.width % 2:
      raise ValueError(f"width {self.width} is odd; positions are pairs: use {self.width + 1}")
    if not self.head_width:
      if self.width % self.heads:
        raise ValueError(
          f"width {self.width} cannot be cut into {self.heads} heads; use a multiple of them, or"
          " give head_width"
        )
      object.__setattr__(self, "head_width", self.width // self.heads)
    for name in ("dropout", "label_smoothing"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1); use 0 for none")


def parse_shape(shape: str) -> tuple[int, int, int]:
  """Reads GPipe's notation of a shape.

  Returns:
    Layers of the encoder (and of the decoder), hidden units of each MLP, attention heads.

  >>> parse_shape("T(64, 16384, 32)")
  (64, 16384, 32)

  Raises:
    ValueError: another notation.
  """
  match = re.fullmatch(r"T\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)", shape)
  if not match:
    raise ValueError(f"shape {shape!r} is not T(layers,hidden,heads); use one like T(6,8192,16)")
  layers, hidden, heads = map(int, match.groups())
  return layers, hidden, heads


class Streams(NamedTuple):
  """The pair that layers pass on.

  Attributes:
    encoded: [B, S, D], the encoder's residual stream; complete after the last encoder layer.
    decoded: [B, T, D], the decoder's residual stream.
  """

  encoded: jax.Array
  decoded: jax.Array


class Embed(nnx.Module):
  """The embedding: `batch["source"]` int [B, S] and `batch["tokens"]` int [B, T] -> streams."""

  def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
    self.config = config
    self.table = _table(config, rngs)

  def __call__(self, batch: Any) -> Streams:
    return Streams(self.look_up(batch["source"]), self.look_up(batch["tokens"]))

  def look_up(self, ids_BT: jax.Array) -> jax.Array:
    """Returns rows of the table plus positions, both of unit scale: int [B, T] -> [B, T, D]."""
    config = self.config
    x_BTD = jnp.take(self.table[...], ids_BT, axis=0).astype(config.dtype) * config.width**0.5
    return x_BTD + positions(ids_BT.shape[1], config.width, x_BTD.dtype)[None]


class EncoderLayer(nnx.Module):
  """Attention within the source, then an MLP, each added to the encoder's stream."""

  def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
    self.config = config
    self.attention_norm, self.attention = _norm(config, rngs), Attention(config, rngs)
    self.mlp_norm, self.mlp = _norm(config, rngs), Mlp(config, rngs)

  def __call__(self, x: Streams, context: Context) -> Streams:
    drop, h = self.config.dropout, x.encoded
    seen_B1QK = source_mask(context.batch["source"], self.config.pad)
    normal = self.attention_norm(h)
    h = h + context.dropout(self.attention(normal, normal, seen_B1QK), drop)
    h = h + context.dropout(self.mlp(self.mlp_norm(h)), drop)
    return Streams(h, x.decoded)


class DecoderLayer(nnx.Module):
  """Causal attention within the target, attention to the source, and an MLP.

  Each is added to the decoder's stream.
  """

  def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
    self.config = config
    self.attention_norm, self.attention = _norm(config, rngs), Attention(config, rngs)
    self.cross_norm, self.cross = _norm(config, rngs), Attention(config, rngs)
    self.encoded_norm = _norm(config, rngs)
    self.mlp_norm, self.mlp = _norm(config, rngs), Mlp(config, rngs)

  def __call__(self, x: Streams, context: Context) -> Streams:
    drop, h = self.config.dropout, x.decoded
    normal = self.attention_norm(h)
    # No mask for padding of the target: it stands behind all else, where a causal mask hides it.
    h = h + context.dropout(self.attention(normal, normal, causal_mask(h.shape[1])), drop)
    seen_B1QK = source_mask(context.batch["source"], self.config.pad)
    encoded = self.encoded_norm(x.encoded)
    h = h + context.dropout(self.cross(self.cross_norm(h), encoded, seen_B1QK), drop)
    h = h + context.dropout(self.mlp(self.mlp_norm(h)), drop)
    return Streams(x.encoded, h)


class Head(nnx.Module):
  """The head: streams -> summed label-smoothed cross-entropy (nats), sum of weights, metrics.

  Reads `batch["targets"]` int [B, T] and `batch["weights"]` float [B, T], 0 where there is padding.
  Metrics, both times the weights: `correct`, 1 for each target that had the largest logit; `nats`,
  the cross-entropy without smoothing.
  """

  def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
    self.config = config
    self.norm = _norm(config, rngs)
    self.table = _table(config, rngs)

  def __call__(self, x: Streams, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    logits_BTV, targets_BT1 = self.logits(x), batch["targets"][..., None]
    weights_BT = batch["weights"].astype(logits_BTV.dtype)
    logs_BTV = jax.nn.log_softmax(logits_BTV)
    nats_BT = -jnp.take_along_axis(logs_BTV, targets_BT1, axis=-1)[..., 0]
    share = self.config.label_smoothing
    smooth_BT = (1 - share) * nats_BT - share * jnp.mean(logs_BTV, axis=-1)
    right_BT = jnp.argmax(logits_BTV, axis=-1) == batch["targets"]
    metrics = {"correct": jnp.sum(right_BT * weights_BT), "nats": jnp.sum(nats_BT * weights_BT)}
    return jnp.sum(smooth_BT * weights_BT), jnp.sum(weights_BT), metrics

  def logits(self, x: Streams) -> jax.Array:
    """Returns logits [B, T, V], float32 at least."""
    return table_logits(self.table[...].astype(self.config.dtype), self.norm(x.decoded))


class Attention(nnx.Module):
  """Multi-head attention of one sequence to another, or to itself (Vaswani et al., section 3.2)."""

  def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
    self.heads, inner = config.heads, config.heads * config.head_width
    self.query = _linear(config, config.width, inner, rngs)
    self.key = _linear(config, config.width, inner, rngs)
    self.value = _linear(config, config.width, inner, rngs)
    self.out = _linear(config, inner, config.width, rngs, _out_scale(config))

  def __call__(self, x_BQD: jax.Array, memory_BKD: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns what each position of x takes from the positions of `memory_BKD`.

    Args:
      x_BQD: positions that queries are made of.
      memory_BKD: positions that keys and values are made of.
      seen: bool, broadcast over [B, N, Q, K]; False hides a key from a query.

    Returns:
      [B, Q, D].
    """
    query, key, value = self.query(x_BQD), self.key(memory_BKD), self.value(memory_BKD)
    query, key, value = (x.reshape(*x.shape[:2], self.heads, -1) for x in (query, key, value))
    mixed_BQNH = attend(query, key, value, seen)
    return self.out(mixed_BQNH.reshape(*mixed_BQNH.shape[:2], -1))


class Mlp(nnx.Module):
  """Two matrices with a ReLU between them: [B, T, D] -> [B, T, D]."""

  def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
    self.up = _linear(config, config.width, config.hidden, rngs)
    self.down = _linear(config, config.hidden, config.width, rngs, _out_scale(config))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return self.down(nnx.relu(self.up(x_BTD)))


def attend(
  query_BQNH: jax.Array, key_BKNH: jax.Array, value_BKNH: jax.Array, seen: jax.Array
) -> jax.Array:
  """Softmax attention with scores and softmaxes in float32 at least.

  Args:
    query_BQNH, key_BKNH, value_BKNH: queries, keys and values, of one dtype.
    seen: bool, broadcast over [B, N, Q, K]. Hidden keys weigh exactly 0; a query that sees none
      gets the mean of all values.

  Returns:
    [B, Q, N, H] in the query's dtype.
  """
  wide = jnp.promote_types(query_BQNH.dtype, jnp.float32)
  scores = jnp.einsum("BQNH,BKNH->BNQK", query_BQNH, key_BKNH, preferred_element_type=wide)
  # Not -inf: in a row of padding all is hidden, and its softmax would be NaN.
  scores = jnp.where(seen, scores * query_BQNH.shape[-1] ** -0.5, jnp.finfo(wide).min)
  shares = jax.nn.softmax(scores).astype(query_BQNH.dtype)
  return jnp.einsum("BNQK,BKNH->BQNH", shares, value_BKNH)


def source_mask(source_BS: jax.Array, pad: int) -> jax.Array:
  """Returns where the source has tokens: int [B, S] -> bool [B, 1, 1, S], False at padding."""
  return (source_BS != pad)[:, None, None, :]


def causal_mask(T: int) -> jax.Array:
  """Returns which target positions see which: bool [1, 1, T, T], no later ones."""
  return jnp.tril(jnp.ones((T, T), bool))[None, None]


def positions(T: int, D: int, dtype: Any) -> jax.Array:
  """Returns sines and cosines of t / 10,000^(2i/D), [T, D] (Vaswani et al., section 3.5).

  Args:
    T: number of positions.
    D: width, even; sines are in the first half and cosines in the second.
    dtype: of the result; angles are computed in float32 at least.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  frequency_h = 10_000.0 ** (-jnp.arange(0, D, 2, dtype=wide) / D)
  angle_Th = jnp.arange(T, dtype=wide)[:, None] * frequency_h[None]
  return jnp.concatenate([jnp.sin(angle_Th), jnp.cos(angle_Th)], axis=1).astype(dtype)


def translation(config: TranslationConfig, partition: Sequence[int] | None = None) -> LayerStack:
  """Returns the model as a stack that the pipeline can cut: L encoder layers, L decoder layers.

  Args:
    config: shape of the model.
    partition: number of layers of each stage, encoder layers first; default, as even as can be.
  """
  encoder = functools.partial(EncoderLayer, config)
  decoder = functools.partial(DecoderLayer, config)
  return LayerStack(
    embed=functools.partial(Embed, config),
    layers=[encoder] * config.layers + [decoder] * config.layers,
    head=functools.partial(Head, config),
    tied={"head/table": "embed/table"},
    partition=partition,
  )


def _table(config: TranslationConfig, rngs: nnx.Rngs) -> nnx.Param:
  """The table [V, D] that embedding and head share."""
  # As output weights of unit-scale features it gives logits of unit scale; the embedding scales up.
  rows, width = config.vocabulary_size, config.width
  return make_table(rows, width, width**-0.5, rngs, config.param_dtype)


def _norm(config: TranslationConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """A norm over the D elements of a position."""
  return nnx.RMSNorm(config.width, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)


def _out_scale(config: TranslationConfig) -> float:
  """Variance scale of the matrices that end a branch.

  It keeps the residual streams' scale at any depth, for each of L layers adds 2 or 3 branches.
  """
  return 1 / (3 * config.layers)


def _linear(
  config: TranslationConfig, fan_in: int, out: int, rngs: nnx.Rngs, scale: float = 1.0
) -> nnx.Linear:
  """A matrix [fan_in, out] without bias, of variance `scale` / `fan_in`."""
  return nnx.Linear(
    fan_in,
    out,
    use_bias=False,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nnx.initializers.variance_scaling(scale, "fan_in", "normal"),
    rngs=rngs,
  )
