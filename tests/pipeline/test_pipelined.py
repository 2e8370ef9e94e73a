"""A training loop of one's own: a plain loss, modules in a row, optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxpipe


class Convolve(nnx.Module):
  def __init__(self, rngs):
    self.inner, self.norm = nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x, context):
    return x + context.dropout(nnx.relu(self.norm(self.inner(x))), 0.1)


class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))


def data(rows=32):
  image = np.random.default_rng(0).normal(size=(rows, 6, 6, 1)).astype(np.float32)
  return {"x": image, "label": (image.mean((1, 2, 3)) > 0).astype(np.int32)}


def loss(y, batch):
  return optax.softmax_cross_entropy_with_integer_labels(y, batch["label"])


def make(batch, **options):
  modules = [
    functools.partial(nnx.Conv, 1, 4, (3, 3)),
    Convolve,
    lambda x: x.mean((1, 2)),
    Normed(),
    functools.partial(nnx.Linear, 6, 2),
  ]
  options = dict(mesh="stage:2", microbatches=4) | options
  return jaxpipe.pipeline(loss, modules, batch, **options)


def train(pipe, batch, steps=25):
  params, state = (init(jax.random.key(0), batch) for init in (pipe.init, pipe.init_state))
  optimizer = optax.adam(1e-2)
  moments = optimizer.init(params)
  losses = []
  for step in range(steps):
    key = jax.random.key(step)
    (value, _, state), grads = pipe.value_and_grad(params, batch, key, state)
    updates, moments = optimizer.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    losses.append(float(value))
  return losses, pipe.unplace(params), pipe.unplace(state)


def test_a_bare_optax_loop_learns_alike_on_any_number_of_stages():
  """NNX with BatchNorm and dropout, Linen with running statistics, shapes that change."""
  batch = data()
  losses, params, state = train(make(batch), batch)
  assert losses[-1] < 0.7 * losses[0]
  others = train(make(batch, mesh="stage:4", schedule="zb-h1", partition=[1, 2, 1, 1]), batch)
  np.testing.assert_allclose(losses, others[0], rtol=1e-4)
  for mine, theirs in ((params, others[1]), (state, others[2])):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), mine, theirs)


def test_the_moving_averages_serve_evaluation():
  batch = data()
  pipe = make(batch)
  key = jax.random.key(0)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  value, _ = pipe.evaluate(params, batch, state)
  shifted = jax.tree.map(lambda leaf: leaf + 1, state)
  assert value != pipe.evaluate(params, batch, shifted)[0]


def test_a_stack_brings_its_own_loss():
  batch = data()
  stack = make(batch).stack
  pipe = jaxpipe.pipeline(None, stack, mesh="stage:2", schedule="gpipe", microbatches=2)
  assert pipe.stack is stack and pipe.schedule.name == "gpipe"
  with pytest.raises(ValueError, match="a LayerStack has a loss"):
    jaxpipe.pipeline(loss, stack)
  with pytest.raises(ValueError, match="need a loss and an example batch"):
    jaxpipe.pipeline(loss, [jnp.tanh])
