"""AmoebaNet-D, the evolved convolutional network that GPipe grew to 1.8 billion parameters.

Every cell is a layer of the stack, and no two groups of them are alike: each reduction cell halves
the picture and doubles the channels. A cell reads the outputs of the two cells before it. With L
normal cells in three groups:

    images -> stem [-> reduction, reduction] -> L/3 normal -> reduction -> L/3 normal -> reduction
           -> L/3 normal -> head

Layers pass on `{"now": [B, H, W, C], "before": [B, H', W', C']}`: the output of the last cell, and
that of the cell before it. After the stem there is only `now`.

References:
  The network: Real et al., arXiv:1802.01548. Its sizes: Huang et al. (GPipe), arXiv:1811.06965.

Dims: B batch rows, H and W height and width of the picture, C channels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.vision.amoebanet_cells import (
  GROUPS,
  NORMAL,
  REDUCTION,
  AmoebaNetConfig,
  Cell,
  CellShape,
  conv,
  norm,
)
from jaxpipe.models.vision.images import classify
from jaxpipe.stack.context import Context
from jaxpipe.stack.module_spec import Factory
from jaxpipe.stack.stack import LayerStack


class Images(nnx.Module):
  """The embedding: `batch["image"]` [B, H, W, C] in the arithmetic's dtype, without parameters."""

  def __init__(self, config: AmoebaNetConfig):
    self.dtype = config.dtype

  def __call__(self, batch: Any) -> jax.Array:
    return jnp.asarray(batch["image"], self.dtype)


class Stem(nnx.Module):
  """The first layer: a convolution of 3x3 and its norm; it halves the picture if stem cells follow.

  Each of the stem cells doubles the channels, so that the stem has as many fewer.
  """

  def __init__(self, config: AmoebaNetConfig, rngs: nnx.Rngs):
    channels = (config.image_channels, config.filters // 2**config.stem_cells)
    strides = (2, 2) if config.stem_cells else (1, 1)
    self.conv = conv(config, channels, rngs, (3, 3), strides)
    self.norm = norm(config, channels[1], rngs)

  def __call__(self, x_BHWC: jax.Array, context: Context) -> dict[str, jax.Array]:
    return {"now": self.norm(self.conv(x_BHWC))}


class Classifier(nnx.Module):
  """The head: ReLU, mean over the picture, logits of the classes, and `classify` of them."""

  def __init__(self, config: AmoebaNetConfig, channels: int, rngs: nnx.Rngs):
    self.logits = nnx.Linear(
      channels, config.classes, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )

  def __call__(
    self, x: dict[str, jax.Array], batch: Any
  ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    return classify(self.logits(jnp.mean(nnx.relu(x["now"]), axis=(1, 2))), batch)


def cell_shapes(config: AmoebaNetConfig) -> list[CellShape]:
  """Returns the wiring and the channels of every cell, in the order of the network."""
  group = [NORMAL] * (config.layers // GROUPS)
  middle = [cell for _ in range(GROUPS - 1) for cell in [*group, REDUCTION]]
  channels = now = before = config.filters // 2**config.stem_cells
  found, halved = [], False
  for genotype in [*[REDUCTION] * config.stem_cells, *middle, *group]:
    channels *= genotype.stride
    found.append(CellShape(genotype, channels, now, before, halved))
    now, before, halved = channels * len(genotype.out), now, genotype is REDUCTION
  return found


def amoebanet(config: AmoebaNetConfig) -> LayerStack:
  """Returns the model as a stack: the stem and every cell are layers, pooling is in the head."""

  # One factory for each shape, so that cells of the same shape are layers of one kind.
  @functools.cache
  def cell(shape: CellShape) -> Factory:
    return functools.partial(Cell, config, shape)

  cells = cell_shapes(config)
  channels = cells[-1].channels * len(cells[-1].genotype.out)
  return LayerStack(
    embed=lambda rngs: Images(config),
    layers=[functools.partial(Stem, config), *map(cell, cells)],
    head=functools.partial(Classifier, config, channels),
  )
