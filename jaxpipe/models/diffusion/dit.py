"""DiT: a transformer whose norms are driven by time and class, trained by flow matching.

A layer is attention and MLP, each behind a norm without weights; what the norm scales and shifts
by, and the gate behind which the result is added, come from the condition (adaLN-zero: all gates
start at zero, so that every layer starts as the identity). The condition travels with the tokens:
x is {"h": [B, N, D], "condition": [B, D]}.

Flow matching: x_t = (1 - t) noise + t data; the model predicts the velocity data - noise. Noise,
time and class are part of the batch, so that every schedule and mesh sees the same.

Dims: B rows, N tokens (patches), C channels of a latent, D width, A heads, E = D / A.

References:
  Peebles and Xie, Scalable diffusion models with transformers (arXiv 2212.09748).
  Lipman et al., Flow matching for generative modeling (arXiv 2210.02747); Liu et al., Flow straight
  and fast (arXiv 2209.03003), whose straight paths these are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe.models.diffusion.patch_codec import TRAINABLE, Encoder, PatchCodec
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack

Linear = Callable[..., nnx.Linear]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitConfig:
  """Shape and arithmetic of the model.

  Attributes:
    classes: number of classes; one more, the number itself, means "no class" (guidance).
    tokens: N.
    layers: number of layers.
    width: D, a multiple of 2 * heads.
    heads: A.
    dtype: of parameters and arithmetic.

  Raises:
    ValueError: a width that does not divide.
  """

  classes: int
  tokens: int
  layers: int = 4
  width: int = 64
  heads: int = 4
  dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if self.width % (2 * self.heads):
      raise ValueError(
        f"width {self.width} over {self.heads} heads; use a multiple of {2 * self.heads}"
      )

  def linear(self, wide: int, narrow: int, rngs: nnx.Rngs, zero: bool = False) -> nnx.Linear:
    """A dense layer; `zero` starts it at zero, as gates and output must."""
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    types = dict(dtype=self.dtype, param_dtype=self.dtype)
    return nnx.Linear(wide, narrow, kernel_init=init, rngs=rngs, **types)


class Tokens(TypedDict):
  """What layers pass on."""

  h: jax.Array
  condition: jax.Array


class Embed(nnx.Module):
  """Encodes the images, goes to time t on the straight path from noise, and embeds."""

  def __init__(self, config: DitConfig, codec: PatchCodec, rngs: nnx.Rngs):
    self.config, D = config, config.width
    self.encoder = Encoder(codec, config.dtype)
    self.project = config.linear(codec.channels, D, rngs)
    draw = functools.partial(jax.random.normal, dtype=config.dtype)
    self.positions = nnx.Param(0.02 * draw(rngs.params(), (config.tokens, D)))
    self.classes = nnx.Param(0.02 * draw(rngs.params(), (config.classes + 1, D)))
    self.time_in, self.time_out = (config.linear(D, D, rngs) for _ in range(2))

  def __call__(self, batch: Any) -> Tokens:
    data_BNC = self.encoder(batch["images"])
    time_B11 = batch["time"].astype(data_BNC.dtype)[:, None, None]
    return self.enter((1 - time_B11) * batch["noise"] + time_B11 * data_BNC, batch)

  def enter(self, latents_BNC: jax.Array, batch: Any) -> Tokens:
    """Tokens of latents at time `batch["time"]` [B] of class `batch["labels"]` [B]."""
    h = self.project(latents_BNC.astype(self.config.dtype)) + self.positions[...][None]
    waves_BD = waves(batch["time"].astype(self.config.dtype), self.config.width)
    time_BD = self.time_out(nnx.silu(self.time_in(waves_BD)))
    return Tokens(h=h, condition=nnx.silu(time_BD + self.classes[...][batch["labels"]]))


class Layer(nnx.Module):
  """Attention and MLP between norms that the condition drives."""

  def __init__(self, config: DitConfig, rngs: nnx.Rngs):
    self.heads, D = config.heads, config.width
    self.modulate = config.linear(D, 6 * D, rngs, zero=True)
    self.qkv, self.out = config.linear(D, 3 * D, rngs), config.linear(D, D, rngs)
    self.up, self.down = config.linear(D, 4 * D, rngs), config.linear(4 * D, D, rngs)

  def __call__(self, x: Tokens, context: Context) -> Tokens:
    h, parts = x["h"], jnp.split(self.modulate(x["condition"])[:, None], 6, axis=-1)
    h = h + parts[0] * self.attend(normed(h, *parts[1:3]))
    h = h + parts[3] * self.down(nnx.gelu(self.up(normed(h, *parts[4:6]))))
    return Tokens(h=h, condition=x["condition"])

  def attend(self, h_BND: jax.Array) -> jax.Array:
    """Every token attends to all."""
    B, N, D = h_BND.shape
    # Not `jax.nn.dot_product_attention`, which softmaxes in float32 whatever its inputs.
    q, k, v = jnp.split(self.qkv(h_BND).reshape(B, N, self.heads, -1), 3, axis=-1)
    scores_BAQK = jnp.einsum("BQAE,BKAE->BAQK", q, k) / np.sqrt(D // self.heads)
    mixed = jnp.einsum("BAQK,BKAE->BQAE", nnx.softmax(scores_BAQK), v)
    return self.out(mixed.reshape(B, N, D))


class Head(nnx.Module):
  """The squared error of the predicted velocity, summed over rows, tokens and channels."""

  def __init__(self, config: DitConfig, codec: PatchCodec, rngs: nnx.Rngs):
    # Its own copy of a few frozen weights, for the alternative is to send the targets along the
    # whole pipeline.
    self.encoder = Encoder(codec, config.dtype)
    self.modulate = config.linear(config.width, 2 * config.width, rngs, zero=True)
    self.out = config.linear(config.width, codec.channels, rngs, zero=True)

  def __call__(self, x: Tokens, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    error_BNC = self.velocity(x) - (self.encoder(batch["images"]) - batch["noise"])
    return jnp.sum(error_BNC**2), jnp.asarray(float(error_BNC.size), error_BNC.dtype), {}

  def velocity(self, x: Tokens) -> jax.Array:
    """The prediction, [B, N, C]."""
    parts = jnp.split(self.modulate(x["condition"])[:, None], 2, axis=-1)
    return self.out(normed(x["h"], *parts))


def normed(h_BND: jax.Array, scale_B1D: jax.Array, shift_B1D: jax.Array) -> jax.Array:
  """LayerNorm without weights of its own, then the condition's scale and shift."""
  centred = h_BND - h_BND.mean(axis=-1, keepdims=True)
  unit = centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
  return unit * (1 + scale_B1D) + shift_B1D


def waves(time_B: jax.Array, width: int) -> jax.Array:
  """Sines and cosines of time in [0, 1], [B, width], of wavelengths 2 pi / 1000 up to 2 pi."""
  rates = 1000.0 ** jnp.linspace(0, 1, width // 2, dtype=time_B.dtype)
  angles = time_B[:, None] * rates[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dit(config: DitConfig, codec: PatchCodec) -> LayerStack:
  """The stack; `batch` holds images [B, H, H], labels int [B], time [B] and noise [B, N, C]."""
  layer = functools.partial(Layer, config)
  return LayerStack(
    embed=functools.partial(Embed, config, codec),
    layers=[layer] * config.layers,
    head=functools.partial(Head, config, codec),
    trainable=TRAINABLE,
  )
