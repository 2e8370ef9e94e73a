"""Layers of every kind through the whole pipeline, against the unpipelined model.

All of them under every schedule and policy: `./launch/test.sh tests/pipeline/test_layers.py
--whole-grid`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
import tiny
import zoo
import zoo_ends
import zoo_loops
from jax import lax

import jaxpipe
from jaxpipe.models.context import LayerInputs
from jaxpipe.pipeline.residuals import POLICIES
from jaxpipe.pipeline.split import split

GRID = list(itertools.product(zoo.LAYERS, ("gpipe", "zb-h1"), ("dots", "all", "full")))


def check(stack, name, batch, residuals="dots"):
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=2)
  mesh = jaxpipe.make_mesh("stage:2")
  return jaxpipe.check(stack, schedule, mesh, batch, residuals=residuals)


@pytest.mark.sampled("name, schedule, residuals", GRID, 10)
def test_gradients_are_those_of_the_unpipelined_model(float64, name, schedule, residuals):
  report = check(zoo.stack(name), schedule, zoo_ends.batch(), residuals)
  assert report.ok and report.tolerance == 1e-12, str(report)


class LoopEmbed(zoo_ends.Embed):
  """An embedding with a loop that starts from a constant."""

  def __call__(self, batch):
    x = super().__call__(batch)
    steps = x["h"].swapaxes(0, 1)
    start = jnp.zeros(steps.shape[1:])
    sums = lax.scan(lambda s, token: (s + token, jnp.sin(s + token)), start, steps)[1]
    return {**x, "h": sums.swapaxes(0, 1)}


class LoopHead(zoo_ends.Head):
  """A head that sums its loss in a loop, by a function with a backward rule of its own."""

  def __call__(self, x, batch):
    rows = zoo_loops.crooked(x["h"] @ self.weight[...])

    def add(sums, row):
      return (sums[0] + row.sum(), sums[1] + jnp.any(row > 0)), None

    loss, count = lax.scan(add, (jnp.zeros(()), jnp.int32(0)), rows)[0]
    return loss, 1.0 * len(rows), {"count": count}


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_loops_at_both_ends(float64, schedule):
  layers = [zoo.LAYERS["custom_vjp_in_a_loop"]] * 2
  stack = jaxpipe.LayerStack(embed=LoopEmbed, layers=layers, head=LoopHead)
  report = check(stack, schedule, zoo_ends.batch())
  assert report.ok, str(report)


def test_loops_in_evaluation(float64):
  stack = jaxpipe.LayerStack(embed=LoopEmbed, layers=[zoo_loops.recurrent] * 2, head=LoopHead)
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=2)
  mesh, batch = jaxpipe.make_mesh("stage:2"), zoo_ends.batch()
  params = stack.init(jax.random.key(0), batch)
  want, _ = jaxpipe.reference_value_and_grad(stack, 2)(params, batch)
  evaluate = jaxpipe.pipeline_forward(stack, schedule, mesh, poison=True)
  got = evaluate(jaxpipe.place(params, stack, schedule, mesh), batch)
  assert jnp.allclose(got[0], want[0], rtol=1e-12)
  assert got[1]["count"] == want[1]["count"]


def flops(part):
  """What the compiler counts for a slice; a loop's body counts once."""
  args = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in part.inputs]
  return jax.jit(part).lower(*args).compile().cost_analysis().get("flops", 0)


def cut(stack, batch, policy):
  shapes = stack.param_shapes()["layers"]
  params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), shapes)
  rows = jnp.arange(2, dtype=jnp.int32)
  inputs = LayerInputs(batch=batch, key=None, layer=0, microbatch=0, rows=rows)
  layer = lambda params, inputs, x: stack.apply_layer(params, x, True, inputs)  # noqa: E731
  return split(layer, params, inputs, stack.check_shapes(batch), policy)


@functools.cache
def counted(name, policy, width=16, length=32):
  """FLOPs of I, W and B."""
  if name == "transformer":
    stack, batch = tiny.stack(width=width, dropout=0.0), tiny.batch(2, length=length)
  else:
    stack, batch = zoo.stack(name), zoo_ends.batch(rows=2)
  policies = {name: policy.layer for name, policy in POLICIES.items()}
  policies["nothing"] = jax.checkpoint_policies.nothing_saveable
  parts = cut(stack, batch, policies[policy])
  return flops(parts.input_grad), flops(parts.weight_grad), flops(parts.backward)


@pytest.mark.parametrize("policy", ["dots", "all", "nothing"])
@pytest.mark.parametrize("name", ["transformer", "perceptron", "conv", "mixture", "recurrent"])
def test_i_and_w_together_cost_no_more_than_the_fused_backward(float64, name, policy):
  """They may cost less: where B is one program, XLA computes some elementwise work twice."""
  i, w, b = counted(name, policy)
  assert 0.8 * b <= i + w <= 1.03 * b


@pytest.mark.parametrize("policy", ["dots", "all", "nothing"])
@pytest.mark.parametrize("name", ["transformer", "perceptron", "conv", "mixture"])
def test_w_is_not_empty(float64, name, policy):
  i, w, _ = counted(name, policy)
  assert w >= 0.2 * i


@pytest.mark.parametrize("policy", ["dots", "all", "nothing"])
def test_i_and_w_cost_what_the_fused_backward_costs(float64, policy):
  """Wide enough that matmuls are most of it, as in any model that is worth a pipeline."""
  i, w, b = counted("transformer", policy, width=64, length=64)
  assert abs(i + w - b) <= 0.03 * b


@pytest.mark.parametrize("policy", ["dots", "all", "nothing"])
def test_a_scan_in_a_layer_is_all_in_i(float64, policy):
  """It costs no more, but nothing of it can wait: its weights' gradients are sums over the scan."""
  i, w, b = counted("recurrent", policy)
  assert i == b and w == 0
