"""DiT by flow matching: what adaLN-zero promises, and what the loss compares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import of_experiments

from jaxpipe.data.experiments.flow_batches import FlowBatches
from jaxpipe.models.diffusion.dit import DitConfig, Embed, Head, Layer, dit, waves
from jaxpipe.models.diffusion.flow import velocity_field
from jaxpipe.models.diffusion.patch_codec import PatchCodec
from jaxpipe.stack.forward import evaluate

CONFIG = dict(classes=3, tokens=4, width=8, heads=2)


def images(count=12, seed=0):
  return np.random.default_rng(seed).random((count, 4, 4)).astype(np.float32)


def batches(rows=4):
  labels = np.arange(12) % 3
  return FlowBatches(images=images(), labels=labels, batch_size=rows, latent=(4, 2), no_class=3)


@pytest.fixture(scope="module")
def codec():
  return PatchCodec.fit(images(), patch=2, channels=2)


def test_a_width_that_heads_do_not_divide():
  with pytest.raises(ValueError, match="width 10 over 2 heads; use a multiple of 4"):
    DitConfig(**{**CONFIG, "width": 10})


def test_every_layer_starts_as_the_identity():
  layer = Layer(DitConfig(**CONFIG), nnx.Rngs(0))
  x = {"h": jnp.ones((2, 4, 8)), "condition": jnp.ones((2, 8))}
  np.testing.assert_array_equal(layer(x, None)["h"], x["h"])


def test_the_loss_of_an_untrained_network_is_the_velocity_squared(codec):
  config, batch = DitConfig(**CONFIG), batches()[0]
  head = Head(config, codec, nnx.Rngs(0))
  loss, weight, _ = head({"h": jnp.ones((4, 4, 8)), "condition": jnp.ones((4, 8))}, batch)
  want = codec.encode(batch["images"]) - batch["noise"]
  np.testing.assert_allclose(loss, (want**2).sum(), rtol=1e-5)
  assert weight == want.size


def test_at_time_one_the_tokens_are_those_of_the_data(codec):
  embed, batch = Embed(DitConfig(**CONFIG), codec, nnx.Rngs(0)), batches()[0]
  batch["time"] = np.ones(4, np.float32)
  np.testing.assert_allclose(
    embed(batch)["h"],
    embed.enter(jnp.asarray(codec.encode(batch["images"])), batch)["h"],
    atol=1e-5,
  )


def test_waves_tell_nearby_times_apart():
  near = waves(jnp.asarray([0.5, 0.501]), 16)
  assert near.shape == (2, 16)
  assert float(jnp.abs(near[0] - near[1]).max()) > 0.3


def test_the_velocity_field_is_what_the_loss_compares(codec):
  stack, batch = dit(DitConfig(**CONFIG, layers=2), codec), batches()[0]
  params = of_experiments.shaken(stack.init(jax.random.key(0), batch))
  data, time = codec.encode(batch["images"]), batch["time"][:, None, None]
  state = stack.init_state(jax.random.key(0), batch)
  latents = jnp.asarray((1 - time) * batch["noise"] + time * data, jnp.float32)
  got = velocity_field(stack, params, state)(latents, batch["time"], batch["labels"])
  loss, _, _ = evaluate(stack, params, state, batch)
  np.testing.assert_allclose(((got - (data - batch["noise"])) ** 2).sum(), loss, rtol=1e-4)
