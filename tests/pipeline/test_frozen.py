"""Layers of one kind with frozen variables keep the loop, and nothing of them is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.pipeline.execution import Execution
from jaxpipe.stack.stack import LayerStack

D, B = 8, 8
BATCH = {
  "x": np.random.default_rng(0).normal(size=(B, D)),
  "y": np.random.default_rng(1).normal(size=B),
}
KEY = jax.random.key(0)


class Embed(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(D, D, rngs=rngs, param_dtype=jnp.float64)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Adapted(nnx.Module):
  """A frozen matrix with a low-rank adapter, a norm that is frozen, and dropout of Flax."""

  def __init__(self, rngs, number=0):
    self.number = number
    base = nnx.Linear(D, D, rngs=rngs, param_dtype=jnp.float64)
    self.inner = nnx.LoRA(D, 2, D, base_module=base, rngs=rngs, param_dtype=jnp.float64)
    self.inner.lora_b[...] = self.inner.lora_b[...] + 0.3
    self.norm = nnx.BatchNorm(D, use_running_average=True, rngs=rngs, param_dtype=jnp.float64)
    self.norm.mean[...], self.norm.var[...] = jnp.full(D, 0.1), jnp.full(D, 1.5)
    self.drop = nnx.Dropout(0.2, rngs=rngs)

  def __call__(self, x):
    return x + self.drop(jnp.tanh(self.norm(self.inner(x))))


class Head(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(D, 1, rngs=rngs, param_dtype=jnp.float64)

  def __call__(self, x, batch):
    return jnp.sum((self.inner(x)[:, 0] - batch["y"]) ** 2), 1.0 * len(x), {}


def adapted(layers=4, **options):
  options = {"trainable": nnx.LoRAParam, **options}
  return LayerStack(Embed, [functools.partial(Adapted)] * layers, Head, **options)


CASES = [
  ("1f1b", "stage:2", "dots"),
  ("zb-h1", "stage:2,data:2", "full"),
  ("interleaved-1f1b", "stage:2,fsdp:2", "all"),
  ("chimera", "stage:2", "dots"),
  ("zeropp", "stage:2,fsdp:2", "dots"),
]


@pytest.mark.sampled("name, mesh, residuals", CASES, 3)
def test_gradients_beside_frozen_variables_are_those_of_one_device(float64, name, mesh, residuals):
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=2)
  stack = adapted(schedule.stages)
  assert stack.uniform and stack.has_state
  report = jaxpipe.check(
    stack, schedule, jaxpipe.make_mesh(mesh), BATCH, residuals=residuals, unroll="none"
  )
  assert len(report.errors) == 2 and report.ok, str(report)


def test_the_gradient_of_an_adapter_is_that_of_the_users_own_model(float64):
  stack = adapted()
  pipe = jaxpipe.pipeline(None, stack, BATCH, mesh="stage:2", schedule="zb-h1", microbatches=2)
  params, state = pipe.init(KEY, BATCH), pipe.init_state(KEY, BATCH)
  model = nnx.List(pipe.modules(params, state))
  value, _ = pipe.evaluate(params, BATCH, state)

  def mean(model):
    x = model[0](BATCH)
    for layer in list(model)[1:-1]:
      x = layer(x)
    return model[-1](x, BATCH)[0] / B

  evaluating = nnx.clone(model)
  evaluating.eval()
  np.testing.assert_allclose(value, mean(evaluating), rtol=1e-12)
  for layer in list(model)[1:-1]:
    layer.drop.rate = 0.0
  quiet = [functools.partial(_Quiet)] * 4
  pipe = jaxpipe.pipeline(
    None, LayerStack(Embed, quiet, Head, trainable=nnx.LoRAParam), BATCH,
    mesh="stage:2", schedule="zb-h1", microbatches=2,
  )  # fmt: skip
  (got, _, after), grads = pipe.value_and_grad(params, BATCH, KEY, state)
  want = nnx.to_pure_dict(nnx.grad(mean, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
  np.testing.assert_allclose(got, mean(model), rtol=1e-12)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  got = pipe.unplace(grads)["layers"]["inner"]
  for i in range(4):
    for name, grad in want[i + 1]["inner"].items():
      np.testing.assert_allclose(got[name][i], grad, rtol=1e-11, atol=1e-15)


class _Quiet(Adapted):
  def __init__(self, rngs):
    super().__init__(rngs)
    self.drop.rate = 0.0


def test_nothing_is_kept_or_summed_for_what_is_frozen(float64):
  """What F keeps, and the gradients' sums, are those of the adapters alone."""
  schedule, mesh = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=2), "stage:2"
  mesh = jaxpipe.make_mesh(mesh)
  report = jaxpipe.memory_report(adapted(), schedule, mesh, BATCH, residuals="dots")
  whole = jaxpipe.memory_report(
    adapted(trainable=nnx.Param), schedule, mesh, BATCH, residuals="dots"
  )
  assert report.bytes["gradients"] < whole.bytes["gradients"] / 3
  assert report.bytes["saved"] < whole.bytes["saved"]
  device = Execution.of(adapted(), schedule, mesh, residuals="dots").inspect(BATCH, lambda d: d)
  kept = [value.shape for value in device.stage.split.saved]
  assert (D, D) not in kept  # no frozen matrix waits for a backward


def test_numbered_layers_with_an_adapter_are_one_loop(float64):
  layers = [functools.partial(Adapted, number=i) for i in range(4)]
  pipe = jaxpipe.pipeline(
    lambda y, b: y.sum(-1), layers, BATCH, mesh="stage:2", microbatches=2, trainable=nnx.LoRAParam
  )
  assert pipe.stack.uniform
