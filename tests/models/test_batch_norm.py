"""Batch norm against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.batch_norm import BatchNorm


@pytest.mark.parametrize("options", [{}, {"use_bias": False, "use_scale": False}])
def test_batch_norm_is_that_of_flax(float64, options):
  options |= dict(momentum=0.9, param_dtype=jnp.float64)
  x = 2 + jax.random.normal(jax.random.key(0), (3, 4, 4, 2))

  def both(kind):
    def loss(x):
      norm = kind(2, **options, rngs=nnx.Rngs(0))
      y = norm(x)
      norm.eval()
      return jnp.sum(jnp.sin(y)), (norm.mean[...], norm.var[...], norm(x))

    return jax.value_and_grad(loss, has_aux=True)(x)

  pairs = zip(*map(jax.tree.leaves, (both(nnx.BatchNorm), both(BatchNorm))), strict=True)
  for theirs, mine in pairs:
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)  # flax's averages are float32 at first


def test_running_averages_are_as_wide_as_the_parameters(float64):
  for narrow, wide in ((jnp.bfloat16, jnp.float32), (jnp.float64, jnp.float64)):
    norm = BatchNorm(2, param_dtype=narrow, rngs=nnx.Rngs(0))
    assert norm.mean[...].dtype == norm.var[...].dtype == wide
