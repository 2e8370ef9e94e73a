"""AmoebaNet-D: its published sizes, what travels between its cells, what is refused."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.vision.amoebanet import amoebanet, cell_shapes
from jaxpipe.models.vision.amoebanet_cells import NORMAL, AmoebaNetConfig, Cell

TINY = dict(layers=3, filters=4, classes=3, image_channels=1, stem_cells=0)


def count(factory):
  module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
  return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def by_hand(shape):
  """Parameters of a cell of C channels: matrices, then scale and bias of every norm."""
  C, few = shape.channels, shape.channels // 4
  one = C * C + 2 * C
  seven = 2 * C * few + 2 * 7 * few**2 + 2 * (3 * few + C)
  three = 2 * C * few + 9 * few**2 + 2 * (2 * few + C)
  own = 3 * one + 2 * seven if shape.genotype is NORMAL else three + seven + one
  before = 0 if shape.before == C and not shape.halved else shape.before * C + 2 * C
  return own + shape.now * C + 2 * C + before


def whole(config):
  """Parameters of the network, by hand."""
  cells = cell_shapes(config)
  stem = config.filters // 2**config.stem_cells
  last = cells[-1].channels * len(cells[-1].genotype.out)
  ends = 9 * config.image_channels * stem + 2 * stem + (last + 1) * config.classes
  return ends + sum(map(by_hand, cells))


# Huang et al., arXiv:1811.06965, Table 1: 82M, 318M, 542M, 1.05B and 1.8B.
@pytest.mark.parametrize(
  "layers, filters, parameters",
  [
    (18, 208, 81_505_540),
    (18, 416, 319_024_120),
    (18, 544, 542_734_840),
    (36, 544, 1_055_832_376),
    (72, 512, 1_844_858_344),
  ],
)
def test_the_published_shapes_have_the_published_parameters(layers, filters, parameters):
  config = AmoebaNetConfig(layers=layers, filters=filters, classes=1000)
  assert whole(config) == parameters


def test_every_cell_has_the_parameters_that_it_should():
  config = AmoebaNetConfig(layers=9, filters=16, classes=10)
  for shape in set(cell_shapes(config)):
    assert count(lambda rngs, shape=shape: Cell(config, shape, rngs)) == by_hand(shape), shape


def shapes_along(config, size):
  """Shapes of what travels, before every layer and behind the last."""
  stack = amoebanet(config)
  x = jax.ShapeDtypeStruct((2, size, size, config.image_channels), np.float32)
  along = []
  for factory in stack.layers:
    module = nnx.eval_shape(lambda factory=factory: factory(nnx.Rngs(0)))
    module.eval()
    x = nnx.eval_shape(lambda module, x: module(x, None), module, x)
    along.append({name: leaf.shape[1:] for name, leaf in x.items()})
  return along


def test_small_pictures_keep_their_size_until_the_first_reduction():
  assert shapes_along(AmoebaNetConfig(**TINY), 8) == [
    {"now": (8, 8, 4)},
    {"now": (8, 8, 16), "before": (8, 8, 4)},
    {"now": (4, 4, 24), "before": (8, 8, 16)},
    {"now": (4, 4, 32), "before": (4, 4, 24)},
    {"now": (2, 2, 48), "before": (4, 4, 32)},
    {"now": (2, 2, 64), "before": (2, 2, 48)},
  ]


def test_the_stem_makes_large_pictures_eight_times_smaller():
  config = AmoebaNetConfig(layers=3, filters=16, classes=3)
  assert shapes_along(config, 30)[:4] == [  # 15 pixels are not even: windows beyond the edge
    {"now": (15, 15, 4)},
    {"now": (8, 8, 24), "before": (15, 15, 4)},
    {"now": (4, 4, 48), "before": (8, 8, 24)},
    {"now": (4, 4, 64), "before": (4, 4, 48)},
  ]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(layers=4), r"4 normal cells do not fill 3 groups"),
    (dict(stem_cells=-1), r"-1 stem cells; use 0 for small pictures"),
    (dict(filters=6), r"6 filters with 0 stem cells; use a multiple of 4"),
    (dict(filters=12, stem_cells=2), r"12 filters with 2 stem cells; use a multiple of 8"),
  ],
)
def test_impossible_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    AmoebaNetConfig(**{**TINY, **changes})
