"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

With experts in place of the MLP, x is a pair: the residual stream, and of every row the losses of
its routers so far, which the head adds to its own.

Dims: B batch rows, T positions (those of this device, S of the whole row), D model width, N query
heads, K key/value heads, H head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.models.attention import attend, check_heads
from jaxpipe.models.context import Context
from jaxpipe.models.cross_entropy import cross_entropy, look_up
from jaxpipe.models.moe import Experts, MoeConfig, check_experts, check_folded, expert_dims
from jaxpipe.models.stack import LayerStack
from jaxpipe.models.tables import Tables
from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR
from jaxpipe.parallel.redco import transformer_rules
from jaxpipe.parallel.sequence import check_divides, own_positions, take_own
from jaxpipe.parallel.tensor import enter_tensor, leave_tensor, own_piece

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
    positions_cut: whether activations between attention and MLP are cut over `tensor` by positions
      (sequence parallelism: Korthikanti et al., arXiv 2205.05198); the same bytes are sent, and
      norms, dropouts and what travels between stages are divided by `tensor` too.
    ulysses: of the devices along `sequence`, how many exchange heads for positions; the others
      exchange keys and values in a ring. 1: all in the ring.
    logits_chunk: positions whose logits live at once; 0: all of a microbatch's.
    moe: experts of width `mlp_width` in place of every layer's MLP, gated; None: no experts.

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
  positions_cut: bool = False
  ulysses: int = 1
  logits_chunk: int = 0
  moe: MoeConfig | None = None

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
    if self.moe and self.mlp != "swiglu":
      raise ValueError(f"mlp {self.mlp!r} with experts: they are gated; use swiglu")
    if self.ulysses < 1 or self.logits_chunk < 0:
      raise ValueError(
        f"ulysses {self.ulysses} is to be 1 or more, and logits_chunk {self.logits_chunk} 0 or more"
      )
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


class Stream(NamedTuple):
  """What layers with experts pass on: x [B, T, D], and losses of its routers for every row [B]."""

  x: jax.Array
  aux: jax.Array


class Embed(nnx.Module):
  """`batch["tokens"]` int [B, S] -> x [B, T, D], this device's positions."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config = config
    shape = (config.vocabulary_size, config.width)
    self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, config.param_dtype))

  def __call__(self, batch: Any) -> jax.Array | Stream:
    pieces = axes.size(TENSOR) if self.config.positions_cut else 1
    check_divides(batch["tokens"].shape[1], axes.size(SEQUENCE), pieces)
    rows_BTD = look_up(self.table[...], self.ids(batch))
    return self.enter(leave_tensor(rows_BTD, self.config.positions_cut), batch)

  def ids(self, batch: Any) -> jax.Array:
    """Rows of the table, [B, T]."""
    return take_own(batch["tokens"])

  def enter(self, rows_BTD: jax.Array, batch: Any) -> jax.Array | Stream:
    """x, of the rows that were looked up."""
    x_BTD = rows_BTD.astype(self.config.dtype)
    if not self.config.moe:
      return x_BTD
    return Stream(x_BTD, jnp.zeros(len(x_BTD), jnp.promote_types(x_BTD.dtype, jnp.float32)))


class Layer(nnx.Module):
  """Pre-norm attention and MLP, each added to its input.

  Each enters `tensor` with what it multiplies by matrices cut along their outputs, and leaves it
  with the sum of what matrices cut along their inputs give (Megatron-LM, arXiv:1909.08053).

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
    if config.moe:
      self.experts = _experts(config, rngs, out)
      return
    self.up = _linear(config, D, config.hidden, rngs)
    if config.mlp == "swiglu":
      self.gate = _linear(config, D, config.hidden, rngs)
    self.down = _linear(config, config.hidden, D, rngs, out)

  def __call__(self, x: Any, context: Context) -> Any:
    cut, moe = self.config.positions_cut, self.config.moe
    x_BTD, length = x.x if moe else x, context.batch["tokens"].shape[1]
    at_T = own_positions(length)
    mine = own_piece(at_T, cut)
    drop = functools.partial(context.dropout, rate=self.config.dropout, positions=mine)

    h_BTD = enter_tensor(self.attention_norm(x_BTD), cut)
    out_BTD = self.attend(h_BTD, at_T, length, context.batch.get("segments"))
    x_BTD = x_BTD + drop(leave_tensor(out_BTD, cut))
    h_BTD = self.mlp_norm(x_BTD)
    if moe:
      y_BTD, aux_B = self.experts(h_BTD)
      return Stream(x_BTD + drop(y_BTD), x.aux + aux_B.astype(x.aux.dtype))
    return x_BTD + drop(leave_tensor(self.mix(enter_tensor(h_BTD, cut)), cut))

  def attend(
    self, x_BTD: jax.Array, at_T: jax.Array, length: int, segments: jax.Array | None
  ) -> jax.Array:
    """Causal attention over the row, with this device's heads."""
    B, T, _ = x_BTD.shape
    config, H = self.config, self.config.head_width
    query = self.query(x_BTD).reshape(B, T, -1, H)
    key = self.key(x_BTD).reshape(B, T, -1, H)
    value = self.value(x_BTD).reshape(B, T, -1, H)
    query, key = rotate(query, config.rope_base, at_T), rotate(key, config.rope_base, at_T)
    query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
    value = checkpoint_name(value, "value")
    mixed = attend(
      *(query, key, value),
      core=config.attention,
      ulysses=config.ulysses,
      segments_BS=segments,
      length=length,
    )
    mixed = checkpoint_name(mixed.reshape(B, T, -1), "attention")
    return checkpoint_name(self.attention_out(mixed), "attention_out")

  def mix(self, x_BTD: jax.Array) -> jax.Array:
    """The MLP, with this device's hidden units."""
    up = checkpoint_name(self.up(x_BTD), "mlp_up")
    if self.config.mlp == "gelu":
      return self.down(nnx.gelu(up))
    gate = checkpoint_name(self.gate(x_BTD), "mlp_gate")
    return self.down(nnx.silu(gate) * up)


class Head(nnx.Module):
  """x -> summed cross-entropy (nats), number of targets, metrics.

  Reads `batch["targets"]` int [B, S] and `batch["weights"]` float [B, S], 0 where there is padding.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.norm = _norm(config, rngs)
    self.config = config
    shape = (config.vocabulary_size, config.width)
    self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, config.param_dtype))

  def __call__(self, x: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    # The table as it is: its gradient is summed over the chunks in its own precision.
    h_BTD, chunk = self.features(x, batch), self.config.logits_chunk
    sums = cross_entropy(h_BTD, self.table[...], *self.targets(batch), chunk)
    if not self.config.moe:
      return sums.loss, sums.weight, {"correct": sums.correct}
    aux = jnp.sum(x.aux).astype(sums.loss.dtype)
    return sums.loss + aux, sums.weight, {"correct": sums.correct, "router_loss": aux}

  def logits(self, x: Any) -> jax.Array:
    """Returns logits [B, T, V], float32 at least."""
    table_VD = self.table[...].astype(self.config.dtype)
    wide = jnp.promote_types(self.config.dtype, jnp.float32)
    return jnp.einsum("BTD,VD->BTV", self.features(x, None), table_VD, preferred_element_type=wide)

  def features(self, x: Any, batch: Any) -> jax.Array:
    """What the table multiplies, [B, T, D]."""
    x_BTD = x.x if self.config.moe else x
    return enter_tensor(self.norm(x_BTD), self.config.positions_cut)

  def targets(self, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Targets int [B, T] and their weights [B, T], of this device's positions."""
    return take_own(batch["targets"]), take_own(batch["weights"])


def rotate(x_BTNH: jax.Array, base: float, at_T: jax.Array) -> jax.Array:
  """Rotary positions (RoFormer, arXiv 2104.09864): turns pair (h, h + H/2) by t * base^(-2h/H).

  Args:
    x_BTNH: queries or keys.
    base: of the frequencies.
    at_T: int [T], the positions t.
  """
  H = x_BTNH.shape[3]
  wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
  frequency = base ** (-jnp.arange(0, H, 2, dtype=wide) / H)
  angle_T1h = (at_T.astype(wide)[:, None] * frequency[None, :])[None, :, None, :]
  sin, cos = jnp.sin(angle_T1h).astype(x_BTNH.dtype), jnp.cos(angle_T1h).astype(x_BTNH.dtype)
  a, b = jnp.split(x_BTNH, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def transformer(config: TransformerConfig) -> LayerStack:
  """Returns the model as a stack that the pipeline can cut."""
  layer = lambda rngs: Layer(config, rngs)  # noqa: E731 - one object, so that layers are one kind
  stack = LayerStack(
    embed=lambda rngs: Embed(config, rngs),
    layers=[layer] * config.layers,
    head=lambda rngs: Head(config, rngs),
    tied={"head/table": "embed/table"} if config.tied else {},
    vocabulary=Tables(embed="table", head="table"),
  )
  rules = transformer_rules(
    stack.param_shapes(),
    config.width,
    extra=_expert_rules(config),
    places=_expert_places(config),
    axes=frozenset({TENSOR, SEQUENCE}),
    check=functools.partial(check_sizes, config),
  )
  return dataclasses.replace(stack, rules=rules)


def check_sizes(config: TransformerConfig, sizes: Mapping[str, int]) -> None:
  """Raises ValueError where the model cannot be cut over a mesh of these sizes."""
  t, c = sizes.get(TENSOR, 1), sizes.get(SEQUENCE, 1)
  check_heads(config.heads, config.kv_heads, t, config.ulysses, c)
  if config.moe:
    check_experts(config.moe, sizes)
    check_folded(config.moe, t, config.positions_cut)


def _expert_rules(config: TransformerConfig) -> list[tuple[str, tuple[str | None, ...]]]:
  dims = expert_dims(config.moe) if config.moe else {}
  return [(f"layers/experts/{name}", names) for name, names in dims.items()]


def _expert_places(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
  if not config.moe:
    return {}
  # Experts that lie over `tensor` are not cut by it in themselves.
  whole: dict[str, tuple[str, ...]] = {"mlp": ()} if config.moe.folded else {}
  return {"experts": config.moe.axes, **whole}


def flops_per_token(config: TransformerConfig, sequence_length: int) -> int:
  """Model FLOPs of one training token, forward and backward, nothing recomputed.

  6 per weight that multiplies (the embedding only looks up), and 12 * D * T per layer for scores
  and mixing, as PaLM counts them (arXiv 2204.02311, appendix B).
  """
  D, H, F = config.width, config.head_width, config.hidden
  attention = D * H * (2 * config.heads + 2 * config.kv_heads)
  mlp = (3 if config.mlp == "swiglu" else 2) * D * F
  if config.moe:
    mlp = 3 * D * (config.moe.top_k * F + config.moe.shared) + D * config.moe.experts
  weights = config.layers * (attention + mlp) + config.vocabulary_size * D
  return 6 * weights + 12 * config.layers * D * sequence_length


def _experts(config: TransformerConfig, rngs: nnx.Rngs, out_scale: float) -> Experts:
  assert config.moe is not None
  return Experts(
    config.moe,
    config.width,
    config.hidden,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    positions_cut=config.positions_cut,
    rngs=rngs,
    out_scale=out_scale,
  )


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
