"""Layers of every kind through the whole pipeline, against the unpipelined model.

All of them under every schedule and policy: `./launch/test.sh tests/pipeline/layer/test_layers.py
--whole-grid`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from networks import layer_ends, layer_kinds, layer_loops, lm

import jaxpipe
from jaxpipe.pipeline.layer.residuals import POLICIES
from jaxpipe.stack.context import Context, LayerInputs

GRID = list(itertools.product(layer_kinds.LAYERS, ("gpipe", "zb-h1"), ("dots", "all", "full")))


def check(stack, name, batch, residuals="dots"):
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=2)
  mesh = jaxpipe.make_mesh("stage:2")
  return jaxpipe.check(stack, schedule, mesh, batch, residuals=residuals, unroll="none")


@pytest.mark.sampled("name, schedule, residuals", GRID, 6)
def test_gradients_are_those_of_the_unpipelined_model(float64, name, schedule, residuals):
  report = check(layer_kinds.stack(name), schedule, layer_ends.batch(), residuals)
  assert report.ok and report.tolerance == 1e-12, str(report)


class LoopEmbed(layer_ends.Embed):
  """An embedding with a loop that starts from a constant."""

  def __call__(self, batch):
    x = super().__call__(batch)
    steps = x["h"].swapaxes(0, 1)
    start = jnp.zeros(steps.shape[1:])
    sums = lax.scan(lambda s, token: (s + token, jnp.sin(s + token)), start, steps)[1]
    return {**x, "h": sums.swapaxes(0, 1)}


class LoopHead(layer_ends.Head):
  """A head that sums its loss in a loop, by a function with a backward rule of its own."""

  def __call__(self, x, batch):
    rows = layer_loops.crooked(x["h"] @ self.weight[...])

    def add(sums, row):
      return (sums[0] + row.sum(), sums[1] + jnp.any(row > 0)), None

    loss, count = lax.scan(add, (jnp.zeros(()), jnp.int32(0)), rows)[0]
    return loss, 1.0 * len(rows), {"count": count}


@pytest.mark.sampled("schedule", ["gpipe", "zb-h1"], 1)
def test_loops_at_both_ends(float64, schedule):
  layers = [layer_kinds.LAYERS["custom_vjp_in_a_loop"]] * 2
  stack = jaxpipe.LayerStack(embed=LoopEmbed, layers=layers, head=LoopHead)
  report = check(stack, schedule, layer_ends.batch())
  assert report.ok, str(report)


def test_loops_in_evaluation(float64):
  stack = jaxpipe.LayerStack(embed=LoopEmbed, layers=[layer_loops.recurrent] * 2, head=LoopHead)
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=2)
  mesh, batch = jaxpipe.make_mesh("stage:2"), layer_ends.batch()
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
  return lm.split(layer, params, inputs, stack.check_shapes(batch), policy)


@functools.cache
def counted(name, policy, width=16, length=32):
  """FLOPs of I, W and B."""
  if name == "transformer":
    stack, batch = lm.stack(width=width, dropout=0.0), lm.batch(2, length=length)
  else:
    stack, batch = layer_kinds.stack(name), layer_ends.batch(rows=2)
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


class Crossed(nnx.Module):
  """Attention to the batch: K and V are made of parameters and data that are not x."""

  def __init__(self, rngs):
    self.k, self.v, self.q = (nnx.Linear(32, 32, rngs=rngs) for _ in range(3))

  def __call__(self, x, context):
    k, v = self.k(context.batch["memory"]), self.v(context.batch["memory"])
    return x + jax.nn.softmax(self.q(x) @ k.swapaxes(1, 2)) @ v


@pytest.mark.parametrize("policy", ["dots", "all"])
def test_what_is_made_of_the_batch_is_kept_and_not_made_again(policy):
  """It was computed again in every backward: 1.2 times the FLOPs, and no policy could help."""
  layer = nnx.eval_shape(lambda: Crossed(nnx.Rngs(0)))
  graph, state = nnx.split(layer)
  params = nnx.to_pure_dict(state)
  x = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
  inputs = LayerInputs(
    batch={"memory": x}, key=None, layer=0, microbatch=0, rows=jnp.arange(2, dtype=jnp.int32)
  )

  def run(params, inputs, x):
    return nnx.merge(graph, params)(x, Context.create(True, **inputs))

  parts = lm.split(run, params, inputs, x, POLICIES[policy].layer)

  def plain(params, inputs, x, dy):
    y, back = jax.vjp(lambda params, x: run(params, inputs, x), params, x)
    return y, back(dy)

  whole = jax.jit(plain).lower(params, inputs, x, x).compile().cost_analysis()["flops"]
  # `dots` drops the scores and makes them again: one of the five matmuls of a forward.
  again = 1.1 if policy == "dots" else 1.03
  assert flops(parts.forward) + flops(parts.backward) <= again * whole
  i, w, b = (flops(part) for part in (parts.input_grad, parts.weight_grad, parts.backward))
  assert abs(i + w - b) <= 0.03 * b


class Settling(nnx.Module):
  """Iterates to a fixed point in evaluation: a loop that nothing can differentiate."""

  def __init__(self, rngs):
    self.inner = layer_ends.dense(rngs)

  def __call__(self, x, context):
    h = jnp.tanh(self.inner(x["h"]))
    if not context.training:
      h = lax.while_loop(lambda h: jnp.max(jnp.abs(h)) > 0.1, lambda h: h / 2, h)
    return {**x, "h": h}


def test_evaluation_differentiates_nothing(float64):
  """It traced a backward pass that it never used, and refused layers that have none."""
  layers, batch = [Settling] * 2, layer_ends.batch()
  stack = jaxpipe.LayerStack(embed=layer_ends.Embed, layers=layers, head=layer_ends.Head)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  mesh, params = jaxpipe.make_mesh("stage:2"), stack.init(jax.random.key(0), batch)
  placed = jaxpipe.place(params, stack, schedule, mesh)
  got, _ = jaxpipe.pipeline_forward(stack, schedule, mesh, poison=True)(placed, batch)
  want = 0.0
  for rows in (slice(0, 2), slice(2, 4)):
    x = stack.apply_embed(params["embed"], {"signal": batch["signal"][rows]})
    for i in range(2):
      inputs = LayerInputs(batch=batch, key=None, layer=i, microbatch=0, rows=jnp.arange(2))
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
      x = stack.apply_layer(layer, x, False, inputs)
    want += stack.apply_head(params["head"], x, batch)[0] / 4
  assert jnp.allclose(got, want, rtol=1e-12)


class Flash(nnx.Module):
  """Attention by a kernel that ships with JAX, which has a backward rule of kernels."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(128, 128, rngs=rngs)

  def __call__(self, x, context):
    h = self.inner(x)[:, None]
    return x + flash_attention(h, h, h, causal=True)[:, 0]


class Wide(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(4, 128, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Sum(nnx.Module):
  def __init__(self, rngs):
    self.weight = nnx.Param(jnp.ones((128,)))

  def __call__(self, x, batch):
    return jnp.sum(x @ self.weight[...]), 1.0 * len(x), {}


@pytest.mark.parametrize("residuals", ["dots", "all"])
def test_a_flash_kernel_is_traced_and_cut(residuals):
  """Kernels run on accelerators only; here they are traced, where they were refused."""
  stack = jaxpipe.LayerStack(embed=Wide, layers=[Flash] * 2, head=Sum)
  schedule = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=2)
  batch = {"x": jax.ShapeDtypeStruct((4, 128, 4), jnp.float32)}
  mesh = jaxpipe.make_mesh("stage:2")
  report = jaxpipe.memory_report(stack, schedule, mesh, batch, residuals=residuals)
  # W of a weight waits for its input and its cotangent at least: x and h, [2, 128, 128] each.
  assert -report.units[2] * report.unit >= 2 * 4 * 2 * 128 * 128
