"""Networks that see an image as a row of patches: their embedding, their head, and their stack.

    image [B, I, J, C] -> patches [B, T, Q Q C] -> x [B, T, D] -> layers -> mean over T -> classes

References:
  Patches: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929.
  The mean over patches in place of a class token: Beyer et al., Better plain ViT baselines,
    arXiv:2205.01580.

Dims: B rows, I x J pixels of C channels, T patches of Q x Q pixels, D width, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxpipe.models.tables import make_table
from jaxpipe.stack.stack import LayerStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig:
  """Shape of the images, of their patches and of the classifier: what all these networks share.

  Attributes:
    image: I, J and C: height, width and channels of an image.
    patch: Q, height and width of a patch in pixels, a divisor of I and of J.
    classes: K, number of classes.
    width: D, width of a patch's embedding.
    layers: number of layers.
    dropout: dropout rate of what a layer's branches add, in [0, 1).
    dtype: dtype of the arithmetic; the loss is float32 at least.
    param_dtype: dtype of the parameters.

  Raises:
    ValueError: patches that do not tile the image.
  """

  image: tuple[int, int, int] = (8, 8, 1)
  patch: int = 2
  classes: int = 10
  width: int = 64
  layers: int = 8
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    I, J, _ = self.image
    if self.patch < 1 or I % self.patch or J % self.patch:
      fits = [n for n in range(1, min(I, J) + 1) if not I % n and not J % n]
      raise ValueError(
        f"patches of {self.patch}x{self.patch} do not tile {I}x{J} pixels; use one of"
        f" {', '.join(map(str, fits))}"
      )

  @property
  def patches(self) -> int:
    """T, the number of patches of an image."""
    return (self.image[0] // self.patch) * (self.image[1] // self.patch)

  @property
  def dtypes(self) -> dict[str, Any]:
    """Both dtypes, by the names of the keyword arguments that Flax modules take them as."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class PatchEmbed(nnx.Module):
  """The embedding: a linear map of each patch, plus a learned vector for its position.

  Reads `batch["image"]` [B, I, J, C] and returns x [B, T, D].
  """

  def __init__(self, config: PatchConfig, rngs: nnx.Rngs):
    self.config = config
    pixels = config.patch**2 * config.image[2]
    self.project = nnx.Linear(pixels, config.width, rngs=rngs, **config.dtypes)
    # About as large as what the patches give: a small set has no time to let them grow from 0.02.
    self.positions = make_table(config.patches, config.width, 0.5, rngs, config.param_dtype)

  def __call__(self, batch: Any) -> jax.Array:
    x_BTD = self.project(cut(batch["image"].astype(self.config.dtype), self.config.patch))
    return x_BTD + self.positions[...].astype(self.config.dtype)[None]


def cut(image_BIJC: jax.Array, patch: int) -> jax.Array:
  """Cuts images into patches in reading order, each with its pixels in reading order.

  Args:
    image_BIJC: the images.
    patch: Q.

  Returns:
    [B, T, Q * Q * C].
  """
  B, I, J, C = image_BIJC.shape
  x = image_BIJC.reshape(B, I // patch, patch, J // patch, patch, C)
  return jnp.swapaxes(x, 2, 3).reshape(B, -1, patch * patch * C)


class PooledHead(nnx.Module):
  """The head: norm, mean over the patches, logits of the classes, and `classify` of them."""

  def __init__(self, config: PatchConfig, rngs: nnx.Rngs):
    self.norm = nnx.LayerNorm(config.width, rngs=rngs, **config.dtypes)
    self.logits = nnx.Linear(config.width, config.classes, rngs=rngs, **config.dtypes)

  def __call__(self, x_BTD: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    return classify(self.logits(self.norm(x_BTD).mean(axis=1)), batch)


def classify(logits_BK: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """Returns the results of a head that classifies rows, from its logits.

  Args:
    logits_BK: a logit for each class.
    batch: `label` int [B], `weights` float [B], 0 for rows that are padding.

  Returns:
    Cross-entropy in nats, summed with the weights; the sum of the weights; and as metrics
    `correct`, the weights of rows whose label had the largest logit. All in float32 at least.
  """
  wide = jnp.promote_types(logits_BK.dtype, jnp.float32)
  logits_BK, weights_B = logits_BK.astype(wide), batch["weights"].astype(wide)
  loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, batch["label"])
  right_B = (logits_BK.argmax(axis=-1) == batch["label"]).astype(wide)
  metrics = {"correct": jnp.sum(right_B * weights_B)}
  return jnp.sum(loss_B * weights_B), jnp.sum(weights_B), metrics


def patch_network(config: PatchConfig, layer: Callable[[nnx.Rngs], nnx.Module]) -> LayerStack:
  """Returns a stack of equal layers between a patch embedding and a pooled head.

  Args:
    config: shape of the network; `config.layers` says how many layers there are.
    layer: factory of a layer `(x [B, T, D], context) -> [B, T, D]`.
  """
  return LayerStack(
    embed=functools.partial(PatchEmbed, config),
    layers=[layer] * config.layers,
    head=functools.partial(PooledHead, config),
  )
