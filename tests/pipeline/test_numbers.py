"""Numbers at the edge: weights that sum to zero, and gradients of sums in float16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import lm

import jaxpipe
from jaxpipe.pipeline.execution import Execution

GPIPE = jaxpipe.make_schedule("gpipe", devices=2, microbatches=2)
MESH = jaxpipe.make_mesh("stage:2")
NONE = dict(unroll="none")


def square(y, batch):
  """A loss for every row, weighed by the batch."""
  each = (y[:, 0].astype(jnp.float32) - batch["y"]) ** 2 * batch["w"]
  return each.sum(), batch["w"].sum(), {"rows": jnp.sum(batch["w"] > 0)}


def modules(uniform, dtype=jnp.float32):
  linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype)
  middle = [functools.partial(linear, 4, 4)] * 2
  return middle if uniform else [*middle, functools.partial(linear, 4, 1)]


def rows(B=8):
  rng = np.random.default_rng(0)
  return {
    "x": rng.normal(size=(B, 4)).astype(np.float32),
    "y": rng.normal(size=B).astype(np.float32),
    "w": np.ones(B, np.float32),
  }


def plain(pipe, params, batch, loss):
  """Mean loss and its gradient, of the modules one after the other, by `jax.grad`."""
  layers = pipe.stack.network.specs
  names = [name for name in layers if name.startswith("layers/")]

  def mean(own):
    x = batch["x"]
    for name in names:
      x = nnx.merge(layers[name].graph, own[name])(x)
    loss_sum, weight, _ = loss(x, batch)
    return loss_sum / weight

  own = {name: pipe.stack.network.split(params)[name] for name in names}
  return jax.value_and_grad(mean)(own)


def worst(pipe, grads, true):
  own = pipe.stack.network.split(pipe.unplace(grads))
  errors = jax.tree.map(
    lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))),
    {name: own[name] for name in true},
    true,
  )
  return max(jax.tree.leaves(errors))


def made(loss, layers, batch, name="gpipe", mesh="stage:2"):
  pipe = jaxpipe.pipeline(loss, layers, batch, mesh=mesh, schedule=name, microbatches=2)
  return dataclasses.replace(pipe, options={**pipe.options, **NONE})


@pytest.mark.parametrize("uniform", [True, False])
def test_weights_that_sum_to_zero_give_zero_and_a_counted_warning(uniform):
  """They gave NaN, which an optimizer spreads to every parameter."""
  batch = rows()
  pipe = made(square, modules(uniform), batch)
  params = pipe.init(jax.random.key(0), batch)
  reference = jaxpipe.reference_value_and_grad(pipe.stack, 2)
  # Of one microbatch alone: the other's rows count.
  batch["w"] = np.array([0] * 4 + [1] * 4, np.float32)
  (loss, metrics), grads = pipe.value_and_grad(params, batch)
  true_loss, true = plain(pipe, pipe.unplace(params), batch, square)
  np.testing.assert_allclose(loss, true_loss, rtol=1e-6)
  assert worst(pipe, grads, true) < 1e-5 and int(metrics["rows"]) == 4
  with pytest.warns(RuntimeWarning, match="sum to zero") as seen:
    for weights in ([0] * 8, [1, -1] * 4, [0.5, 0, -0.5, 0] * 2):
      batch["w"] = np.array(weights, np.float32)
      (loss, _), grads = jax.block_until_ready(pipe.value_and_grad(params, batch))
      (true_loss, _), true = reference(pipe.unplace(params), batch)
      assert float(loss) == float(true_loss) == 0
      assert all(not leaf.any() for leaf in jax.tree.leaves((grads, true)))
    pipe.value_and_grad(params, rows())  # looks at what was not known yet
  assert ": 3 of" in str(seen[-1].message) and seen[-1].filename == __file__
  # The call after it may be done, too, when the warning is given.
  with pytest.warns(RuntimeWarning, match="1 of [12] calls") as seen:
    value = jax.block_until_ready(pipe.evaluate(params, batch))[0]
    pipe.evaluate(params, rows())
  assert float(value) == 0 and seen[-1].filename == __file__


def big(y, batch):
  """Its gradient is that of a mean over rows whose sum no float16 holds."""
  each = y.astype(jnp.float32).sum(-1) - batch["y"]
  return (each * batch["w"]).sum(), batch["w"].sum(), {}


def mean_of(y, batch):
  return y.astype(jnp.float32).sum(-1) - batch["y"]


class Inside(nnx.Module):
  """Computes in float16 between float32 parameters and a float32 x."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(4, 4, rngs=rngs, dtype=jnp.float16)

  def __call__(self, x):
    return self.inner(x).astype(jnp.float32)


FLOAT16 = {
  "uniform, weights of the batch": (modules(True, jnp.float16), big, "gpipe", "stage:2"),
  "packed, weights of the batch": (modules(False, jnp.float16), big, "zb-h1", "stage:2"),
  "packed, a loss for every row": (modules(False, jnp.float16), mean_of, "1f1b", "stage:2,data:2"),
  "inside a layer alone": ([Inside] * 2, mean_of, "1f1b", "stage:2"),
}


@pytest.mark.parametrize("kind", FLOAT16)
def test_float16_overflows_no_sooner_than_the_gradient_of_the_mean(kind):
  layers, loss, name, mesh = FLOAT16[kind]
  batch = rows(64)
  # Of a sum over 32 rows more than 65504.
  batch["x"] = np.full((64, 4), 4000.0, np.float32 if kind.startswith("inside") else np.float16)
  pipe = made(loss, layers, batch, name, mesh)
  sums = loss if loss is big else lambda y, b: (mean_of(y, b).sum(), 64.0, {})
  key = jax.random.key(0)
  params = jax.tree.map(lambda p: jnp.abs(p) / 8, pipe.init(key, batch))
  (value, _), grads = pipe.value_and_grad(params, batch)
  true_value, true = plain(pipe, pipe.unplace(params), batch, sums)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((true, value, true_value)))
  assert worst(pipe, grads, true) < 1e-2
  np.testing.assert_allclose(value, true_value, rtol=1e-3)
  (_, _), other = jaxpipe.reference_value_and_grad(pipe.stack, 2)(pipe.unplace(params), batch)
  assert worst(pipe, pipe.place(other), true) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_float16_is_scaled(dtype):
  stack = lm.stack(dtype=dtype, param_dtype="float32", dropout=0.0)
  scaled = Execution.of(stack, GPIPE, MESH).inspect(
    lm.batch(4), lambda device: device.context.loss_scale is not None
  )
  assert scaled == (dtype == "float16")


def tiny_loss(y, batch):
  """Its gradient is below the least number that float16 holds."""
  return y.astype(jnp.float32).sum(-1) * 2.0**-26


@pytest.mark.parametrize("uniform, name", [(True, "zb-h1"), (False, "1f1b")])
def test_a_loss_scale_keeps_gradients_that_vanish_in_float16(uniform, name):
  """Compared with float32, whose parameters are the same."""
  batch, key = rows(), jax.random.key(0)
  half = {**batch, "x": batch["x"].astype(np.float16)}
  pipe = made(tiny_loss, modules(uniform, jnp.float16), half, name)
  wide = made(tiny_loss, modules(uniform), batch, name)
  params = pipe.init(key, half)
  same = wide.place(jax.tree.map(lambda p: p.astype(jnp.float32), pipe.unplace(params)))
  (value, _), true = wide.value_and_grad(same, batch)
  (_, _), lost = pipe.value_and_grad(params, half)
  (got, _), grads = pipe.value_and_grad(params, half, loss_scale=jnp.float32(2**20))
  own, before = (jax.tree.leaves(pipe.unplace(tree)) for tree in (grads, lost))
  for a, b, c in zip(own, jax.tree.leaves(wide.unplace(true)), before, strict=True):
    scale = np.abs(b).max()
    assert np.abs(a - b).max() < 1e-2 * scale < np.abs(c - b).max()
  np.testing.assert_allclose(got, value, rtol=1e-2)


def test_a_loss_scale_halves_and_doubles():
  scale = jaxpipe.LossScale.start(8.0, interval=3)
  values = []
  for finite in (True, True, False, True, True, True, True, False, False, False, False, False):
    scale = jax.jit(lambda s, f: s.adjust(f))(scale, jnp.array(finite))
    values.append(float(scale.value))
  assert values == [8, 8, 4, 4, 4, 8, 8, 4, 2, 1, 1, 1]
  assert bool(jaxpipe.all_finite({"a": jnp.ones(2), "b": {}}))
  assert not jaxpipe.all_finite({"a": jnp.ones(2), "b": jnp.array([1, jnp.nan])})
  for value in 3.0, 0.25, 2.0**25:
    with pytest.raises(ValueError, match=rf"loss scale of {value} is no power of two from 1"):
      jaxpipe.LossScale.start(value)
