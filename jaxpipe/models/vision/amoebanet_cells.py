"""The cells of AmoebaNet-D: the wiring that evolution found, and the operations that it chose from.

A cell reads the outputs of the two cells before it as states 0 and 1. Each new state is the sum of
two operations on states that there are, and the cell's output joins some of the states along the
channels:

    0 = last cell's output    1 = output of the cell before it    2 = op(state) + op(state)    ...

The wiring is that of Real et al. (arXiv:1802.01548, figure of AmoebaNet-D) as GPipe (Huang et al.,
arXiv:1811.06965, Table 1) ran it: a normal cell also passes on its own first state, without which
the parameters of GPipe's table do not come out.

Dims: B batch rows, H and W height and width of the picture, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.batch_norm import BatchNorm
from jaxpipe.models.vision.pictures import Convolution, max_pool
from jaxpipe.stack.context import Context

GROUPS = 3  # groups of normal cells, with a reduction cell between each two
_EPSILON = 1e-3  # of every batch norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmoebaNetConfig:
  """Shape and arithmetic of the model.

  Attributes:
    layers: L, number of normal cells, a multiple of 3.
    filters: D, number of channels of the cells of the first group; later groups have 2 D and 4 D.
    classes: number of labels.
    image_channels: number of channels of the input, 3 for colours.
    stem_cells: number of reduction cells before the first group. The published 2 follow a stem that
      halves the picture too, which is for large pictures; 0 keeps small ones whole.
    momentum: share that the running averages of every batch norm keep of themselves at each step;
      published 0.9997, which takes tens of thousands of steps to settle.
    convolution: how to convolve; `pictures.convolve` is the fast way on a CPU.
    dtype: dtype of the arithmetic; norms and the loss are float32 at least.
    param_dtype: dtype of the parameters.

  Raises:
    ValueError: shapes that do not divide.
  """

  layers: int
  filters: int
  classes: int
  image_channels: int = 3
  stem_cells: int = 2
  momentum: float = 0.9997
  convolution: Convolution = jax.lax.conv_general_dilated
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if self.layers < GROUPS or self.layers % GROUPS:
      raise ValueError(f"{self.layers} normal cells do not fill {GROUPS} groups; use a multiple")
    if self.stem_cells < 0:
      raise ValueError(f"{self.stem_cells} stem cells; use 0 for small pictures, 2 for large ones")
    # Each stem cell doubles the channels, and bottlenecks take a quarter of the least channels.
    unit = max(4, 2 ** (self.stem_cells + 1))
    if self.filters < unit or self.filters % unit:
      raise ValueError(
        f"{self.filters} filters with {self.stem_cells} stem cells; use a multiple of {unit}"
      )


class Genotype(NamedTuple):
  """The wiring of a cell, as evolution found it.

  Attributes:
    pairs: for each new state, from state 2 on, the two operations whose results are added; each is
      (number of the state that it reads, name of the operation).
    out: numbers of the states whose concatenation along the channels is the cell's output.
    stride: stride of the operations that read states 0 and 1; 2 in a reduction cell.
  """

  pairs: tuple[tuple[tuple[int, str], tuple[int, str]], ...]
  out: tuple[int, ...]
  stride: int


NORMAL = Genotype(
  pairs=(
    ((1, "conv_1x1"), (1, "max_3x3")),
    ((0, "conv_1x7_7x1"), (1, "skip")),
    ((0, "conv_1x1"), (0, "conv_1x7_7x1")),
    ((2, "max_3x3"), (2, "skip")),
    ((1, "avg_3x3"), (5, "conv_1x1")),
  ),
  out=(0, 3, 4, 6),
  stride=1,
)
REDUCTION = Genotype(
  pairs=(
    ((0, "max_2x2"), (0, "max_3x3")),
    ((1, "conv_3x3"), (2, "skip")),
    ((2, "conv_1x7_7x1"), (2, "max_3x3")),
    ((1, "max_2x2"), (3, "skip")),
    ((2, "avg_3x3"), (3, "conv_1x1")),
  ),
  out=(4, 5, 6),
  stride=2,
)


class CellShape(NamedTuple):
  """The wiring of one cell of a network, and the shapes of what it reads.

  Attributes:
    genotype: its wiring.
    channels: C, number of channels of each of its states.
    now: number of channels of the last cell's output.
    before: number of channels of the output of the cell before that.
    halved: whether the older output is twice as high and wide as the newer one, for the last cell
      was a reduction cell.
  """

  genotype: Genotype
  channels: int
  now: int
  before: int
  halved: bool


class Convolve(nnx.Module):
  """ReLU, a convolution without bias, batch norm: [B, H, W, channels[0]] -> [..., channels[1]]."""

  def __init__(
    self,
    config: AmoebaNetConfig,
    channels: tuple[int, int],
    rngs: nnx.Rngs,
    kernel: tuple[int, int] = (1, 1),
    strides: tuple[int, int] = (1, 1),
  ):
    self.conv = conv(config, channels, rngs, kernel, strides)
    self.norm = norm(config, channels[1], rngs)

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    return self.norm(self.conv(nnx.relu(x_BHWC)))


class Bottleneck(nnx.Module):
  """Convolutions on a quarter of the channels, between two of 1x1 that narrow and widen.

  With a stride of 2, a kernel halves the picture along each dim that it is wider than 1 along.
  """

  def __init__(
    self,
    config: AmoebaNetConfig,
    channels: int,
    kernels: tuple[tuple[int, int], ...],
    stride: int,
    rngs: nnx.Rngs,
  ):
    few = channels // 4

    def step(size: int) -> int:
      """The stride along a dim, by the kernel's size there."""
      return stride if size > 1 else 1

    self.convolve = nnx.List(
      [
        Convolve(config, (channels, few), rngs),
        *(Convolve(config, (few, few), rngs, (h, w), (step(h), step(w))) for h, w in kernels),
        Convolve(config, (few, channels), rngs),
      ]
    )

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    for convolve in self.convolve:
      x_BHWC = convolve(x_BHWC)
    return x_BHWC


class FactorizedReduction(nnx.Module):
  """Halves a picture without skipping pixels: half the channels read even ones, half odd ones."""

  def __init__(self, config: AmoebaNetConfig, channels: tuple[int, int], rngs: nnx.Rngs):
    half = (channels[0], channels[1] // 2)
    self.even = conv(config, half, rngs)
    self.odd = conv(config, half, rngs)
    self.norm = norm(config, channels[1], rngs)

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    x_BHWC = nnx.relu(x_BHWC)
    H, W = x_BHWC.shape[1:3]
    # A picture of odd size has one pixel more at even places: zeros fill up the odd ones.
    odd_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)))[:, 1::2, 1::2]
    halves = [self.even(x_BHWC[:, ::2, ::2]), self.odd(odd_BHWC)]
    return self.norm(jnp.concatenate(halves, axis=-1))


class Pool(nnx.Module):
  """Maximum or mean over square windows; pixels outside the picture are in no window.

  The attribute `kind` is `max` or `avg`, `size` the window's height and width, `stride` the pixels
  from one window to the next.
  """

  def __init__(self, kind: str, size: int, stride: int):
    self.kind, self.size, self.stride = kind, size, stride

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    if self.kind == "max":
      return max_pool(x_BHWC, self.size, self.stride)
    window, strides = (self.size,) * 2, (self.stride,) * 2
    return nnx.avg_pool(x_BHWC, window, strides, "SAME", count_include_pad=False)


class Skip(nnx.Module):
  """The identity, as an operation among the others."""

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    return x_BHWC


class Cell(nnx.Module):
  """One cell: both inputs brought to its channels and size, then the operations of its wiring."""

  def __init__(self, config: AmoebaNetConfig, shape: CellShape, rngs: nnx.Rngs):
    C, self.genotype = shape.channels, shape.genotype
    self.now = Convolve(config, (shape.now, C), rngs)
    self.before: nnx.Module = Skip()
    if shape.halved:
      self.before = FactorizedReduction(config, (shape.before, C), rngs)
    elif shape.before != C:
      self.before = Convolve(config, (shape.before, C), rngs)
    self.operations = nnx.List(
      [
        _operation(name, config, C, self.genotype.stride if state < 2 else 1, rngs)
        for pair in self.genotype.pairs
        for state, name in pair
      ]
    )

  def __call__(self, x: dict[str, jax.Array], context: Context) -> dict[str, jax.Array]:
    # Behind the stem there is one output alone, which is read twice.
    states = [self.now(x["now"]), self.before(x.get("before", x["now"]))]
    results = iter(self.operations)
    for (a, _), (b, _) in self.genotype.pairs:
      states.append(next(results)(states[a]) + next(results)(states[b]))
    out_BHWC = jnp.concatenate([states[i] for i in self.genotype.out], axis=-1)
    return {"now": out_BHWC, "before": x["now"]}


def _operation(
  name: str, config: AmoebaNetConfig, channels: int, stride: int, rngs: nnx.Rngs
) -> nnx.Module:
  """The module of one operation of a genotype, by its name, from and to as many channels."""
  kind, _, size = name.partition("_")
  if kind in ("max", "avg"):
    return Pool(kind, int(size[0]), stride)
  if kind == "skip":
    return Skip()
  if size == "1x1":
    return Convolve(config, (channels, channels), rngs, strides=(stride, stride))
  kernels = {"3x3": ((3, 3),), "1x7_7x1": ((1, 7), (7, 1))}[size]
  return Bottleneck(config, channels, kernels, stride, rngs)


def conv(
  config: AmoebaNetConfig,
  channels: tuple[int, int],
  rngs: nnx.Rngs,
  kernel: tuple[int, int] = (1, 1),
  strides: tuple[int, int] = (1, 1),
) -> nnx.Conv:
  """Returns a convolution without bias, from `channels[0]` to `channels[1]` channels."""
  return nnx.Conv(
    *channels,
    kernel,
    strides,
    use_bias=False,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "uniform"),
    conv_general_dilated=config.convolution,
    rngs=rngs,
  )


def norm(config: AmoebaNetConfig, channels: int, rngs: nnx.Rngs) -> BatchNorm:
  """Returns a batch norm over so many channels, with the configuration's momentum."""
  return BatchNorm(
    channels,
    momentum=config.momentum,
    epsilon=_EPSILON,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    rngs=rngs,
  )
