"""A Vision Transformer: patches, pre-norm layers of attention and MLP, the mean over patches.

References:
  Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929.

Dims: as in `images`, and N heads of width H.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import nnx

from jaxpipe.models.vision.images import PatchConfig, patch_network
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(PatchConfig):
  """Shape and arithmetic of the model, in addition to those of `PatchConfig`.

  Attributes:
    heads: N, number of attention heads, a divisor of the width.
    mlp_width: hidden width of the MLP.
    attention: the attention itself, called as `(query, key, value, is_causal=False) -> mixed`, all
      [B, T, N, H]. The default computes softmaxes in float32 whatever its inputs; a float64 oracle
      gives a function of its own.

  Raises:
    ValueError: shapes that do not divide.
  """

  heads: int = 4
  mlp_width: int = 128
  attention: Callable[..., jax.Array] = jax.nn.dot_product_attention

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.width % self.heads:
      raise ValueError(f"width {self.width} cannot be cut into {self.heads} heads; use a divisor")


class Block(nnx.Module):
  """One layer: pre-norm attention over all patches and MLP, each added to its input [B, T, D]."""

  def __init__(self, config: VitConfig, rngs: nnx.Rngs):
    self.config, D = config, config.width
    self.attention_norm = nnx.LayerNorm(D, rngs=rngs, **config.dtypes)
    self.query_key_value = nnx.Linear(D, 3 * D, rngs=rngs, **config.dtypes)
    self.attention_out = nnx.Linear(D, D, rngs=rngs, **config.dtypes)
    self.mlp_norm = nnx.LayerNorm(D, rngs=rngs, **config.dtypes)
    self.up = nnx.Linear(D, config.mlp_width, rngs=rngs, **config.dtypes)
    self.down = nnx.Linear(config.mlp_width, D, rngs=rngs, **config.dtypes)

  def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
    rate = self.config.dropout
    x_BTD = x_BTD + context.dropout(self.attend(self.attention_norm(x_BTD)), rate)
    hidden_BTF = nnx.gelu(self.up(self.mlp_norm(x_BTD)))
    return x_BTD + context.dropout(self.down(hidden_BTF), rate)

  def attend(self, x_BTD: jax.Array) -> jax.Array:
    """Returns attention in which every patch sees every patch: [B, T, D] -> [B, T, D]."""
    B, T, D = x_BTD.shape
    N = self.config.heads
    parts = self.query_key_value(x_BTD).reshape(B, T, 3, N, D // N)
    mixed = self.config.attention(*(parts[:, :, i] for i in range(3)), is_causal=False)
    return self.attention_out(mixed.reshape(B, T, D))


def vit(config: VitConfig) -> LayerStack:
  """Returns the model as a stack; its batches have `image`, `label` and `weights`."""
  return patch_network(config, functools.partial(Block, config))
