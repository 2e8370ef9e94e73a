"""Double precision, for the tests that ask for it."""

import jax
import pytest


@pytest.fixture
def float64():
  """Double precision for one test; elsewhere the suite runs in JAX's default."""
  before = jax.config.jax_enable_x64
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", before)
