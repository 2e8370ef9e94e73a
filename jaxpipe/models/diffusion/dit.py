"""DiT: a diffusion transformer whose norms depend on time and class, trained by flow matching.

A layer is attention and MLP, each behind a norm without weights. The norm's scale and shift, and a
gate that the result is multiplied by before it is added, are linear maps of the *condition*, a
vector made of time and class (adaLN-zero: these maps start at zero, so that every layer starts as
the identity). The condition travels with the tokens: x is {"h": [B, N, D], "condition": [B, D]}.

Flow matching: on the straight path x_t = (1 - t) noise + t data, the model predicts the velocity
data - noise from x_t, t and the class. Noise, time and class are part of the batch, so that every
schedule and mesh sees the same.

Dims: B rows, N tokens (patches), C channels of a latent, D width, A heads, E = D / A.

References:
  Peebles and Xie, Scalable diffusion models with transformers (arXiv 2212.09748).
  Lipman et al., Flow matching for generative modeling (arXiv 2210.02747); Liu et al., Flow straight
  and fast (arXiv 2209.03003), whose straight paths these are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe.models.diffusion.patch_codec import TRAINABLE, Encoder, PatchCodec
from jaxpipe.models.tables import make_table
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitConfig:
  """Shape and arithmetic of the model.

  Attributes:
    classes: number of classes, with labels from 0 on. The label `classes` means "no class", for
      classifier-free guidance.
    tokens: N, number of tokens of an image, which are its patches.
    layers: number of layers.
    width: D, width of a token, a multiple of 2 * heads.
    heads: A, number of attention heads.
    dtype: dtype of parameters and arithmetic.

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
    """Returns a dense layer from `wide` to `narrow` elements.

    Args:
      wide: elements of the input.
      narrow: elements of the output.
      rngs: as Flax takes it.
      zero: whether its matrix starts at zero, as those of gates and of the output must.
    """
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    types = dict(dtype=self.dtype, param_dtype=self.dtype)
    return nnx.Linear(wide, narrow, kernel_init=init, rngs=rngs, **types)


class Tokens(TypedDict):
  """The dict that layers pass on.

  Keys:
    h: [B, N, D], the tokens.
    condition: [B, D], time and class, the same for every layer.
  """

  h: jax.Array
  condition: jax.Array


class Embed(nnx.Module):
  """The embedding: encodes images, mixes them with noise as time t says, and embeds the result.

  Reads `images` [B, H, H], `noise` [B, N, C], `time` [B] in [0, 1] and `labels` int [B].
  """

  def __init__(self, config: DitConfig, codec: PatchCodec, rngs: nnx.Rngs):
    self.config, D = config, config.width
    self.encoder = Encoder(codec, config.dtype)
    self.project = config.linear(codec.channels, D, rngs)
    self.positions = make_table(config.tokens, D, 0.02, rngs, config.dtype)
    # One row more than classes, for "no class".
    self.classes = make_table(config.classes + 1, D, 0.02, rngs, config.dtype)
    self.time_in, self.time_out = (config.linear(D, D, rngs) for _ in range(2))

  def __call__(self, batch: Any) -> Tokens:
    data_BNC = self.encoder(batch["images"])
    time_B11 = batch["time"].astype(data_BNC.dtype)[:, None, None]
    return self.enter((1 - time_B11) * batch["noise"] + time_B11 * data_BNC, batch)

  def enter(self, latents_BNC: jax.Array, batch: Any) -> Tokens:
    """Embeds latents that are already on their path, as sampling has them.

    Args:
      latents_BNC: latents at time t.
      batch: `time` [B], the t of each row, and `labels` int [B].

    Returns:
      Tokens and condition.
    """
    h = self.project(latents_BNC.astype(self.config.dtype)) + self.positions[...][None]
    waves_BD = waves(batch["time"].astype(self.config.dtype), self.config.width)
    time_BD = self.time_out(nnx.silu(self.time_in(waves_BD)))
    return Tokens(h=h, condition=nnx.silu(time_BD + self.classes[...][batch["labels"]]))


class Layer(nnx.Module):
  """Attention and MLP, each behind a norm and before a gate that depend on the condition."""

  def __init__(self, config: DitConfig, rngs: nnx.Rngs):
    self.heads, D = config.heads, config.width
    self.modulate = config.linear(D, 6 * D, rngs, zero=True)
    self.qkv, self.out = config.linear(D, 3 * D, rngs), config.linear(D, D, rngs)
    self.up, self.down = config.linear(D, 4 * D, rngs), config.linear(4 * D, D, rngs)

  def __call__(self, x: Tokens, context: Context) -> Tokens:
    # Gate, scale and shift of attention, then those of the MLP.
    h, parts = x["h"], jnp.split(self.modulate(x["condition"])[:, None], 6, axis=-1)
    h = h + parts[0] * self.attend(normed(h, *parts[1:3]))
    h = h + parts[3] * self.down(nnx.gelu(self.up(normed(h, *parts[4:6]))))
    return Tokens(h=h, condition=x["condition"])

  def attend(self, h_BND: jax.Array) -> jax.Array:
    """Returns attention of every token to all tokens: [B, N, D] -> [B, N, D]."""
    B, N, D = h_BND.shape
    # Not `jax.nn.dot_product_attention`, which softmaxes in float32 whatever its inputs.
    q, k, v = jnp.split(self.qkv(h_BND).reshape(B, N, self.heads, -1), 3, axis=-1)
    scores_BAQK = jnp.einsum("BQAE,BKAE->BAQK", q, k) / np.sqrt(D // self.heads)
    mixed = jnp.einsum("BAQK,BKAE->BQAE", nnx.softmax(scores_BAQK), v)
    return self.out(mixed.reshape(B, N, D))


class Head(nnx.Module):
  """The head: squared error of the predicted velocity, summed over rows, tokens and channels.

  The weight is the number of summed elements; there are no metrics. Reads `images` and `noise`.
  """

  def __init__(self, config: DitConfig, codec: PatchCodec, rngs: nnx.Rngs):
    # A second copy of a few frozen weights: without it, the targets would have to travel along the
    # whole pipeline.
    self.encoder = Encoder(codec, config.dtype)
    self.modulate = config.linear(config.width, 2 * config.width, rngs, zero=True)
    self.out = config.linear(config.width, codec.channels, rngs, zero=True)

  def __call__(self, x: Tokens, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    error_BNC = self.velocity(x) - (self.encoder(batch["images"]) - batch["noise"])
    return jnp.sum(error_BNC**2), jnp.asarray(float(error_BNC.size), error_BNC.dtype), {}

  def velocity(self, x: Tokens) -> jax.Array:
    """Returns the predicted velocity of each latent, [B, N, C]."""
    parts = jnp.split(self.modulate(x["condition"])[:, None], 2, axis=-1)
    return self.out(normed(x["h"], *parts))


def normed(h_BND: jax.Array, scale_B1D: jax.Array, shift_B1D: jax.Array) -> jax.Array:
  """LayerNorm without weights of its own, then a scale and a shift that the condition gives.

  Args:
    h_BND: tokens.
    scale_B1D: added to a scale of 1.
    shift_B1D: added to the result.
  """
  centred = h_BND - h_BND.mean(axis=-1, keepdims=True)
  unit = centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
  return unit * (1 + scale_B1D) + shift_B1D


def waves(time_B: jax.Array, width: int) -> jax.Array:
  """Returns sines and cosines of time in [0, 1], of wavelengths 2 pi / 1000 up to 2 pi.

  Args:
    time_B: times.
    width: number of results for each time, even.

  Returns:
    [B, width], sines in the first half and cosines in the second.
  """
  rates = 1000.0 ** jnp.linspace(0, 1, width // 2, dtype=time_B.dtype)
  angles = time_B[:, None] * rates[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dit(config: DitConfig, codec: PatchCodec) -> LayerStack:
  """Returns the model as a stack, with the codec's encoder as frozen state.

  Args:
    config: shape of the model.
    codec: encodes images of H by H pixels into N latents of C channels. Batches have `images`
      [B, H, H], `labels` int [B], `time` [B] and `noise` [B, N, C].
  """
  layer = functools.partial(Layer, config)
  return LayerStack(
    embed=functools.partial(Embed, config, codec),
    layers=[layer] * config.layers,
    head=functools.partial(Head, config, codec),
    trainable=TRAINABLE,
  )
