"""A U-Net: a convolutional network that names every pixel, with skip connections across stages.

The left half halves the picture again and again and pushes each result onto a list of skips; the
right half doubles the picture and pops the skip of its size. The list travels between layers inside
x, `{"h": [B, H, W, C], "skips": (...)}`, so that any two layers may lie on any two stages: a skip
passes through all stages between them.

    down   down   down   bottom   up   up   up      pictures of H, H/2, H/4, H/8, H/4, H/2, H
      |      |      '---------------'    |    |
      |      '---------------------------'    |
      '---------------------------------------'

References:
  Ronneberger et al., U-Net, arXiv:1505.04597. Long et al., Fully convolutional networks for
  semantic segmentation, arXiv:1411.4038.

Dims: B batch rows, H and W height and width of the picture, C channels, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.batch_norm import BatchNorm
from jaxpipe.models.vision.pictures import Convolution, max_pool
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack

# What layers pass on: `h`, the picture so far, and `skips`, a tuple of pictures of earlier sizes.
Flow = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
  """Shape and arithmetic of the model.

  Attributes:
    classes: K, number of classes, the background among them.
    widths: number of channels at each size of the picture, the whole one first. Each next size is
      half as high and wide, so that H and W are to be multiples of 2 ** (len(widths) - 1).
    image_channels: number of channels of the input.
    momentum: share that the running averages of every batch norm keep of themselves at each step.
    convolution: how to convolve; `pictures.convolve` is the fast way on a CPU.
    dtype: dtype of the arithmetic; norms and the loss are float32 at least.
    param_dtype: dtype of the parameters.

  Raises:
    ValueError: fewer than two widths.
  """

  classes: int
  widths: tuple[int, ...] = (16, 32, 64, 64)
  image_channels: int = 1
  momentum: float = 0.9
  convolution: Convolution = jax.lax.conv_general_dilated
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if len(self.widths) < 2:
      raise ValueError(f"{len(self.widths)} widths leave nothing to skip; give two or more")


class Convolutions(nnx.Module):
  """Two convolutions of 3x3, each with batch norm and ReLU: [B, H, W, fan_in] -> [B, H, W, C]."""

  def __init__(self, config: SegmentationConfig, fan_in: int, channels: int, rngs: nnx.Rngs):
    dtypes: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
    options = dict(use_bias=False, conv_general_dilated=config.convolution, **dtypes)
    sizes = ((fan_in, channels), (channels, channels))
    self.convs = nnx.List([nnx.Conv(*size, (3, 3), **options) for size in sizes])
    self.norms = nnx.List([BatchNorm(channels, momentum=config.momentum, **dtypes) for _ in sizes])

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x_BHWC = nnx.relu(norm(conv(x_BHWC)))
    return x_BHWC


class Picture(nnx.Module):
  """The embedding: `batch["image"]` [B, H, W, C] as it is, and no skips; it has no parameters.

  Raises:
    ValueError: pictures that cannot be halved as often as there are widths.
  """

  def __init__(self, config: SegmentationConfig):
    self.config = config

  def __call__(self, batch: Any) -> Flow:
    images_BHWC = jnp.asarray(batch["image"], self.config.dtype)
    H, W = images_BHWC.shape[1:3]
    halvings = len(self.config.widths) - 1
    if H % 2**halvings or W % 2**halvings:
      raise ValueError(
        f"pictures of {H}x{W} halved {halvings} times; use multiples of {2**halvings}"
      )
    return {"h": images_BHWC, "skips": ()}


class Down(nnx.Module):
  """Convolutions, whose result becomes a skip for the layer that comes back to this size.

  Then the picture is halved by maxima over 2x2 pixels.
  """

  def __init__(self, config: SegmentationConfig, fan_in: int, channels: int, rngs: nnx.Rngs):
    self.convolutions = Convolutions(config, fan_in, channels, rngs)

  def __call__(self, x: Flow, context: Context) -> Flow:
    h_BHWC = self.convolutions(x["h"])
    return {"h": max_pool(h_BHWC, 2, 2), "skips": (*x["skips"], h_BHWC)}


class Bottom(nnx.Module):
  """Convolutions on the picture of the smallest size; the skips pass by."""

  def __init__(self, config: SegmentationConfig, fan_in: int, channels: int, rngs: nnx.Rngs):
    self.convolutions = Convolutions(config, fan_in, channels, rngs)

  def __call__(self, x: Flow, context: Context) -> Flow:
    return {**x, "h": self.convolutions(x["h"])}


class Up(nnx.Module):
  """Doubles the picture, joins it with the skip of its new size, and convolves both."""

  def __init__(self, config: SegmentationConfig, fan_in: int, channels: int, rngs: nnx.Rngs):
    # A 2x2 convolution transposed, of stride 2: each pixel times a matrix gives four.
    self.double = nnx.Linear(
      fan_in, 4 * channels, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )
    self.convolutions = Convolutions(config, 2 * channels, channels, rngs)

  def __call__(self, x: Flow, context: Context) -> Flow:
    *skips, skip_BHWC = x["skips"]
    B, H, W, C = skip_BHWC.shape
    fours = self.double(x["h"]).reshape(B, H // 2, W // 2, 2, 2, C)
    doubled_BHWC = fours.transpose(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
    both_BHWC = jnp.concatenate([skip_BHWC, doubled_BHWC], axis=-1)
    return {"h": self.convolutions(both_BHWC), "skips": tuple(skips)}


class Pixels(nnx.Module):
  """The head: a linear map at every pixel; cross-entropy (nats) and number of pixels, summed.

  Reads `batch["label"]` int [B, H, W] and `batch["weights"]` float [B], 0 for rows of padding.

  Metrics: `correct` pixels, and for every class [K] the pixels where label and answer are both that
  class (`intersection`) and where at least one is (`union`); see `mean_iou`.
  """

  def __init__(self, config: SegmentationConfig, rngs: nnx.Rngs):
    self.linear = nnx.Linear(
      config.widths[0],
      config.classes,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      rngs=rngs,
    )

  def __call__(self, x: Flow, batch: Any) -> Any:
    logits_BHWK = self.linear(x["h"])
    logits_BHWK = logits_BHWK.astype(jnp.promote_types(logits_BHWK.dtype, jnp.float32))
    # As one-hot vectors, so that all counts below are sums of products.
    truth_BHWK = jax.nn.one_hot(batch["label"], logits_BHWK.shape[-1], dtype=logits_BHWK.dtype)
    answer_BHWK = jax.nn.one_hot(
      jnp.argmax(logits_BHWK, axis=-1), logits_BHWK.shape[-1], dtype=logits_BHWK.dtype
    )
    weights_B = batch["weights"].astype(logits_BHWK.dtype)

    def count(a_BHWK: jax.Array) -> jax.Array:
      """The sum over pixels, rows weighted."""
      return jnp.einsum("BHWK,B->K", a_BHWK, weights_B)

    shared_K = count(truth_BHWK * answer_BHWK)
    union_K = count(truth_BHWK) + count(answer_BHWK) - shared_K
    return (
      -jnp.sum(count(truth_BHWK * jax.nn.log_softmax(logits_BHWK))),
      jnp.sum(count(truth_BHWK)),
      {"correct": jnp.sum(shared_K), "intersection": shared_K, "union": union_K},
    )


def mean_iou(intersection_K: Any, union_K: Any) -> float:
  """Returns intersection over union, averaged over the classes that occur in labels or answers.

  Args:
    intersection_K, union_K: the metrics of those names, summed over all batches.
  """
  occurs_K = union_K > 0
  return float((intersection_K[occurs_K] / union_K[occurs_K]).mean())


def segmentation(config: SegmentationConfig) -> LayerStack:
  """Returns the model as a stack of `2 * len(widths) - 1` layers."""
  fan_ins = (config.image_channels, *config.widths)
  *down, last = zip(fan_ins, config.widths, strict=False)
  up = zip(config.widths[:0:-1], config.widths[-2::-1], strict=True)

  return LayerStack(
    embed=lambda rngs: Picture(config),
    layers=[
      *(functools.partial(Down, config, *sizes) for sizes in down),
      functools.partial(Bottom, config, *last),
      *(functools.partial(Up, config, *sizes) for sizes in up),
    ],
    head=functools.partial(Pixels, config),
  )
