"""Layers that a user writes for a mesh, as the guide shows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.parallel import axes


class Embed(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(8, 16, param_dtype=jnp.float64, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(16, 64, use_bias=False, param_dtype=jnp.float64, rngs=rngs)
    self.down = nnx.Linear(64, 16, use_bias=False, param_dtype=jnp.float64, rngs=rngs)

  def __call__(self, x, context):
    y = axes.total(self.down(nnx.gelu(self.up(x))), "tensor")
    return x + context.dropout(y, 0.1)


class Head(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(16, 1, param_dtype=jnp.float64, rngs=rngs)

  def __call__(self, x, batch):
    error = self.inner(x)[:, 0] - batch["y"]
    return jnp.sum(error**2), 1.0 * len(error), {"rows": len(error), "far": jnp.sum(error > 1)}


def stack(*dims):
  rules = jaxpipe.Rules(axes=frozenset({"tensor"}), dims=dims)
  return jaxpipe.LayerStack(embed=Embed, layers=[Mlp] * 4, head=Head, rules=rules)


MLP = (("layers/up/kernel", (None, "mlp")), ("layers/down/kernel", ("mlp", None)))


@pytest.mark.smoke
@pytest.mark.sampled("mesh", ["stage:2,tensor:2,fsdp:2", "stage:2,tensor:4"], 1)
def test_a_sum_over_tensor_is_all_that_a_layer_needs(float64, mesh):
  rng = np.random.default_rng(0)
  batch = {"x": rng.normal(size=(16, 8)), "y": rng.normal(size=16)}
  schedule = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=4)
  report = jaxpipe.check(
    stack(*MLP, ("embed/.*|head/.*", None)),
    schedule,
    jaxpipe.make_mesh(mesh),
    batch,
    unroll="none",
  )
  # Metrics too, whole numbers among them: all devices along `tensor` have counted them.
  assert report.ok, report


def test_a_parameter_that_no_rule_covers_is_named(float64):
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=2)
  mesh = jaxpipe.make_mesh("stage:2,tensor:2")
  with pytest.raises(ValueError, match=r"parameter embed/inner/bias .* no rule .*tensor:2; name"):
    jaxpipe.pipeline_value_and_grad(stack(*MLP), schedule, mesh)


def test_a_loop_from_a_constant_beside_a_sum_is_not_traced_off_the_mesh(float64):
  """There it would see one device, and leave out the sum."""

  class Loops(Mlp):
    def __call__(self, x, context):
      y = axes.total(self.down(self.up(x)), "tensor")
      return x + jax.lax.fori_loop(0, 2, lambda _, s: s + y, jnp.zeros(y.shape, y.dtype))

  rules = jaxpipe.Rules(axes=frozenset({"tensor"}), dims=(*MLP, ("embed/.*|head/.*", None)))
  loops = jaxpipe.LayerStack(embed=Embed, layers=[Loops] * 2, head=Head, rules=rules)
  batch = {"x": np.ones((4, 8)), "y": np.ones(4)}
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=2)
  with pytest.raises(ValueError, match=r"starts from a constant"):
    jaxpipe.check(loops, schedule, jaxpipe.make_mesh("stage:2,tensor:2"), batch)
