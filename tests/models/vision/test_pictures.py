"""What networks on pictures are made of, against XLA's own operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxpipe.models.vision.pictures import convolve, max_pool

DIMS = ("NHWC", "HWIO", "NHWC")


def picture(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  "size, kernel, strides",
  [(6, (3, 3), (1, 1)), (5, (3, 3), (2, 2)), (6, (1, 7), (1, 2)), (6, (7, 1), (2, 1))],
)
def test_a_convolution_and_its_gradients_are_xlas(size, kernel, strides):
  x, w = picture(2, size, size, 3), picture(*kernel, 3, 4)

  def both(by):
    def loss(x, w):
      return jnp.sum(jnp.sin(by(x, w, strides, "SAME", dimension_numbers=DIMS)))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    both(convolve),
    both(lax.conv_general_dilated),
  )


def test_a_flax_convolution_takes_it():
  def make(**options):
    return nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)

  x = picture(2, 6, 6, 3)
  np.testing.assert_allclose(make(conv_general_dilated=convolve)(x), make()(x), atol=1e-5)
  for options, message in (
    (dict(padding="VALID"), r"got VALID"),
    (dict(kernel_dilation=2), r"\(1, 1, 2, 2\)"),
  ):
    with pytest.raises(ValueError, match=message):
      make(conv_general_dilated=convolve, **options)(x)


@pytest.mark.parametrize("size, window, stride", [(6, 3, 1), (6, 3, 2), (5, 3, 2), (6, 2, 2)])
def test_a_maximum_and_its_gradient_are_xlas(size, window, stride):
  x = picture(2, size, size, 3)  # no equals, which would share the gradient

  def both(by):
    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(by(x)))))(x)

  theirs = both(lambda x: nnx.max_pool(x, (window,) * 2, (stride,) * 2, "SAME"))
  mine = both(lambda x: max_pool(x, window, stride))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mine, theirs)
