"""A decoder-only transformer: pre-norm attention and MLP, of the kinds its configuration names.

    x -+- norm - query, key, value - attention - attention_out - + -+- norm - MLP - + -> x
       '---------------------------------------------------------'  '---------------'

Both branches are cut over `tensor`: heads in one, hidden units in the other
(`jaxpipe.parallel.tensor`). With experts in place of the MLP, x is a pair: the residual stream, and
for every row the losses of its routers so far, which the head adds to its own.

References:
  Vaswani et al., Attention Is All You Need, arXiv 1706.03762; Radford et al., GPT-2, 2019; Touvron
  et al., Llama, arXiv 2302.13971.

Dims: B batch rows, T positions (those of this device, S of the whole row), D model width, N query
heads, K key/value heads, H head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.models.transformer.adapters import check_frozen, flops_beside_base, trained
from jaxpipe.models.transformer.attention import attend, check_heads
from jaxpipe.models.transformer.config import TransformerConfig, flops_per_token
from jaxpipe.models.transformer.dense import Dense, make_dense, make_norm
from jaxpipe.models.transformer.ends import Embed, Head, Stream
from jaxpipe.models.transformer.moe import Experts, check_experts, check_folded, expert_dims
from jaxpipe.models.transformer.rotary import rotate
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR
from jaxpipe.parallel.redco import transformer_rules
from jaxpipe.parallel.sequence import own_positions
from jaxpipe.parallel.tensor import enter_tensor, leave_tensor, own_piece
from jaxpipe.stack.context import Context
from jaxpipe.stack.paths import merged
from jaxpipe.stack.stack import LayerStack
from jaxpipe.stack.vocabulary import Tables

Tree = Any


class Layer(nnx.Module):
  """Pre-norm attention and MLP, each added to its input.

  Each branch enters `tensor` with what it multiplies by matrices cut along their outputs, and
  leaves it with the sum of what matrices cut along their inputs give (Megatron-LM,
  arXiv:1909.08053), to which their biases are then added.

  A residual policy can keep by name: `query` and `key` (as attention takes them), `value`,
  `attention` (the values mixed), `attention_out`, `mlp_up`, and with `swiglu` `mlp_gate`.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config, rules = config, config.completep
    # 0.02 is the standard deviation of fresh matrices, of those that end a branch `out`.
    usual = 0.02 * (rules.deviation if rules else 1)
    # Keeps the residual stream's scale at any depth, unless branches are scaled as they are added.
    out = usual / (2 * config.layers / (rules.depth if rules else 1)) ** 0.5
    D, F, H = config.width, config.hidden, config.H
    qkv, everywhere = config.bias != "none", config.bias == "all"

    def dense(fan_in: int, out: int, bias: bool, scale: float = usual) -> Dense:
      return make_dense(config, fan_in, out, rngs, bias=bias, scale=scale)

    self.attention_norm = make_norm(config, rngs)
    self.query = dense(D, config.heads * H, qkv)
    self.key = dense(D, config.kv_heads * H, qkv)
    self.value = dense(D, config.kv_heads * H, qkv)
    if config.qk_norm:
      self.query_norm, self.key_norm = make_norm(config, rngs, H), make_norm(config, rngs, H)
    self.attention_out = dense(config.heads * H, D, everywhere, out)
    self.mlp_norm = make_norm(config, rngs)
    if config.moe:
      self.experts = _experts(config, rngs, out)
      return
    self.up = dense(D, F, everywhere)
    if config.mlp == "swiglu":
      self.gate = dense(D, F, everywhere)
    self.down = dense(F, D, everywhere, out)

  def __call__(self, x: Any, context: Context) -> Any:
    cut, moe = self.config.positions_cut, self.config.moe
    x_BTD, length = x.x if moe else x, context.batch["tokens"].shape[1]
    at_T = own_positions(length)
    outside_T = own_piece(at_T, cut)
    rate, rules = self.config.dropout, self.config.completep

    def drop(y_BTD: jax.Array) -> jax.Array:
      """Dropout and scale of what a branch adds."""
      # By global positions, so that masks are the same on every mesh.
      y_BTD = context.dropout(y_BTD, rate, positions=outside_T)
      return y_BTD * rules.branch if rules else y_BTD

    h_BTD = enter_tensor(self.attention_norm(x_BTD), cut)
    out_BTD = self.attend(h_BTD, at_T, length, context.batch.get("segments"))
    x_BTD = x_BTD + drop(self.attention_out.shift(leave_tensor(out_BTD, cut)))
    h_BTD = self.mlp_norm(x_BTD)
    if moe:
      y_BTD, aux_B = self.experts(h_BTD)
      return Stream(x_BTD + drop(y_BTD), x.aux + aux_B.astype(x.aux.dtype))
    y_BTD = leave_tensor(self.mix(enter_tensor(h_BTD, cut)), cut)
    return x_BTD + drop(self.down.shift(y_BTD))

  def attend(
    self, x_BTD: jax.Array, at_T: jax.Array, length: int, segments: jax.Array | None
  ) -> jax.Array:
    """Returns causal attention with this device's heads, its part of the sum over `tensor`.

    Args:
      x_BTD: normed x, with all positions of `tensor`.
      at_T: int [T], the global positions of x.
      length: S, positions of the whole row.
      segments: int [B, S], the document of each position; None: each row is one document.
    """
    B, T, _ = x_BTD.shape
    config = self.config
    query, key, value = (
      projection(x_BTD).reshape(B, T, -1, config.H)
      for projection in (self.query, self.key, self.value)
    )
    if config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    # By global positions: those of a device need not begin at 0, nor be neighbours.
    if config.positions == "rotary":
      query, key = (rotate(x, config.rope_base, at_T, config.rope_scaling) for x in (query, key))
    query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
    value = checkpoint_name(value, "value")
    mixed = attend(
      query,
      key,
      value,
      core=config.attention,
      ulysses=config.ulysses,
      segments_BS=segments,
      length=length,
    )
    mixed = checkpoint_name(mixed.reshape(B, T, -1), "attention")
    # Without the bias, which every device along `tensor` would add: it waits for their sum.
    return checkpoint_name(self.attention_out.multiply(mixed), "attention_out")

  def mix(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the MLP of x [B, T, D] with this device's hidden units: its part of the sum."""
    up = checkpoint_name(self.up(x_BTD), "mlp_up")
    if self.config.mlp == "gelu":
      return self.down.multiply(nnx.gelu(up))
    gate = checkpoint_name(self.gate(x_BTD), "mlp_gate")
    return self.down.multiply(nnx.silu(gate) * up)


def transformer(config: TransformerConfig, freeze: str = "") -> LayerStack:
  """Returns the model as a stack that the pipeline can cut, with rules for all six mesh axes.

  Its batches have `tokens` and `targets` int [B, S], `weights` float [B, S], 0 for padding, and
  perhaps `segments` int [B, S], the document of each position.

  Args:
    config: of the model.
    freeze: regular expression of whole paths of parameters that do not train, such as
      `embed/.*|layers/0/.*`, a tied table by `embed/table`; empty: with adapters (`config.lora`)
      all but these, else none.
      Layers of which others are frozen are not alike, and lie packed.

  Raises:
    ValueError: `freeze` is no regular expression, or matches nothing or everything.
  """
  tied = {"head/table": "embed/table"} if config.tied else {}
  stack = LayerStack(
    embed=functools.partial(Embed, config),
    layers=[functools.partial(Layer, config)] * config.layers,
    head=functools.partial(Head, config),
    tied=tied,
    vocabulary=Tables(embed="table", head="table"),
    trainable=trained(config.lora, freeze, tied),
  )
  check_frozen(stack, freeze)
  # Rules are written from the parameters' shapes, which a stack knows once it is made.
  rules = transformer_rules(
    _all_shapes(stack),
    config.width,
    extra=_expert_rules(config),
    places=_expert_places(config),
    axes=frozenset({TENSOR, SEQUENCE}),
    check=functools.partial(check_sizes, config),
  )
  return dataclasses.replace(stack, rules=rules)


def _all_shapes(stack: LayerStack) -> Tree:
  """Shapes of what trains and of what is frozen, in one tree; runs of layers by their numbers."""
  params, state = stack.param_shapes(), stack.state_shapes()
  if len(stack.network.runs) == 1:
    return merged(params, state)
  runs = [merged(*pair) for pair in zip(params.pop("layers"), state.pop("layers"), strict=True)]
  return {**merged(params, state), "layers": dict(enumerate(runs))}


def training_flops(config: TransformerConfig, stack: LayerStack, length: int) -> int:
  """Returns the model FLOPs of one training token; see `flops_per_token`.

  Args:
    config: of the model.
    stack: `transformer(config, ...)`. What is frozen in it has no gradients.
    length: S, positions of a row.
  """
  visited = config.moe.top_k / config.moe.experts if config.moe else 1.0
  return flops_per_token(config, length) + flops_beside_base(stack, visited)


def check_sizes(config: TransformerConfig, sizes: Mapping[str, int]) -> None:
  """Checks that the model can be cut over a mesh.

  Args:
    config: of the model.
    sizes: mesh axis -> number of devices; an axis left out has one.

  Raises:
    ValueError: heads or experts that the mesh's axes do not divide.
  """
  t, c = sizes.get(TENSOR, 1), sizes.get(SEQUENCE, 1)
  check_heads(config.heads, config.kv_heads, t, config.ulysses, c)
  if config.moe:
    check_experts(config.moe, sizes)
    check_folded(config.moe, t, config.positions_cut)


def _expert_rules(config: TransformerConfig) -> list[tuple[str, tuple[str | None, ...]]]:
  """Rules for the experts' parameters, which have more dims than Redco's rules cover."""
  dims = expert_dims(config.moe) if config.moe else {}
  # With the number of a run, where others of the layers' parameters are frozen.
  return [(rf"layers/(\d+/)?experts/{name}", names) for name, names in dims.items()]


def _expert_places(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
  """The mesh axes over which experts lie, and their hidden units."""
  if not config.moe:
    return {}
  # Experts that lie over `tensor` are not cut by it in themselves.
  whole: dict[str, tuple[str, ...]] = {"mlp": ()} if config.moe.folded else {}
  return {"experts": config.moe.axes, **whole}


def _experts(config: TransformerConfig, rngs: nnx.Rngs, out_scale: float) -> Experts:
  """The experts of one layer; `out_scale` is the deviation of the matrices that end a branch."""
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
