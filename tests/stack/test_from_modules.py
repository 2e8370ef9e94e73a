"""Stacks from modules in a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from jaxpipe.stack.stack import LayerStack, StackError

BATCH = {"x": np.ones((4, 8, 8, 1), np.float32), "label": np.zeros(4, np.int32)}


def loss(y, batch):
  return optax.softmax_cross_entropy_with_integer_labels(y, batch["label"])


def make(modules, loss=loss, **options):
  return LayerStack.from_modules(modules, loss=loss, batch=BATCH, **options)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x, context):
    return x + context.dropout(self.inner(x), 0.1)


def pooled(x):
  return x.mean((1, 2))


def test_nnx_linen_and_functions_in_a_row():
  start = nnx.Linear(6, 3, rngs=nnx.Rngs(5))
  stack = make(
    [functools.partial(nnx.Conv, 1, 5, (3, 3)), nn.Conv(6, (3, 3)), jnp.tanh, pooled, Block, start]
  )
  params = stack.init(jax.random.key(0), BATCH)
  kernels = [run["kernel"].shape for run in params["layers"] if "kernel" in run]
  assert kernels == [(1, 3, 3, 1, 5), (1, 3, 3, 5, 6), (1, 6, 3)]
  # A module that is given starts from its own values.
  np.testing.assert_array_equal(params["layers"][-1]["kernel"][0], start.kernel[...])


def test_modules_of_one_kind_are_uniform():
  assert make([Block] * 3, inputs=lambda batch: pooled(batch["x"]) * jnp.ones((1, 6))).uniform


@pytest.mark.parametrize(
  "modules, options, message",
  [
    ([], {}, "got modules=\\[\\]"),
    ([nnx.relu, Block], {}, r"layers\[1\] \(Block\) cannot be called with float32\[4, 8, 8, 1\]"),
    ([nn.Dense], {}, "is the Linen class Dense; give an instance"),
    ([3], {}, "no module, no factory and no function"),
    ([pooled], {"inputs": "image"}, "inputs='image' is not in the batch, which has 'x', 'label'"),
    ([pooled], {"loss": lambda y, batch: jnp.mean(y)}, r"shape \(\) for 4 rows"),
  ],
)
def test_what_does_not_fit_is_named(modules, options, message):
  with pytest.raises(StackError, match=message):
    make(modules, **options)
