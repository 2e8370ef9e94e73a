"""Deep Speech 2: both directions of time."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.speech.deep_speech import DeepSpeechConfig, Recurrent
from jaxpipe.stack.context import Context

CONFIG = dict(bands=8, symbols=4, channels=2, width=3, dropout=0.0)


def test_bands_that_cannot_be_halved_twice():
  with pytest.raises(ValueError, match="bands 6 cannot be halved twice; use a multiple of 4"):
    DeepSpeechConfig(**{**CONFIG, "bands": 6})


def test_time_backwards_is_the_other_direction():
  layer = Recurrent(DeepSpeechConfig(**CONFIG), 5, nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 5)), jnp.float32)
  context = Context({}, True, None, jnp.arange(2))
  forwards = layer(x, context)

  def swap(a, axis):
    return jnp.concatenate(jnp.split(a, 2, axis=axis)[::-1], axis=axis)

  layer.inputs.kernel[...] = swap(layer.inputs.kernel[...], 1)
  layer.recurrent[...] = layer.recurrent[...][::-1]
  np.testing.assert_allclose(layer(x[:, ::-1], context)[:, ::-1], forwards, atol=1e-5)
  assert jnp.abs(layer(x, context) - forwards).max() > 1e-2


def test_a_direction_is_flax_s_gru():
  D, rngs = 3, nnx.Rngs(0)
  layer = Recurrent(DeepSpeechConfig(**CONFIG), 5, rngs)
  layer.eval()  # statistics of mean 0 and variance 1: hardly a norm
  cell = nnx.GRUCell(5, D, rngs=rngs)
  for gate, of_cell in enumerate((cell.dense_i, cell.dense_h)):
    own = layer.inputs.kernel[...] if gate == 0 else layer.recurrent[...][0]
    update, reset, new = jnp.split(own[:, : 3 * D], 3, axis=1)
    # Flax orders the gates otherwise, and the rest of its biases are zero.
    of_cell.kernel[...] = jnp.concatenate([reset, update, new], axis=1)
  layer.inputs.kernel[...] = layer.inputs.kernel[...].at[:, 3 * D :].set(0)  # backwards: all zero
  layer.recurrent[...] = layer.recurrent[...].at[1].set(0)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 5)), jnp.float32)
  got, h = layer(x, Context({}, False, None, jnp.arange(2))), jnp.zeros((2, D))
  for t in range(6):
    h, _ = cell(h, x[:, t])
    np.testing.assert_allclose(got[:, t], h, atol=1e-4)
