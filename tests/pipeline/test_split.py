"""A layer cut in three against `jax.vjp` of the whole layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpipe.pipeline.residuals import POLICIES
from jaxpipe.pipeline.split import split

POLICY = {name: policy.layer for name, policy in POLICIES.items()} | {
  "nothing": jax.checkpoint_policies.nothing_saveable
}


@jax.custom_vjp
def clipped(x):
  return x


clipped.defvjp(lambda x: (x, x), lambda x, dy: (jnp.where(jnp.abs(x) < 1, dy, 0),))


def mlp(params, inputs, x):
  return x + jnp.tanh(x @ params["a"]) @ params["b"]


def with_custom_rules(params, inputs, x):
  return x + clipped(jax.nn.gelu(x @ params["a"])) @ params["b"] + jax.nn.relu(x)


def with_remat_inside(params, inputs, x):
  return jax.checkpoint(mlp)(params, inputs, mlp(params, inputs, x))


def with_unused_and_shared(params, inputs, x):
  return x + (x @ params["a"]) @ params["a"].T


def with_inputs(params, inputs, x):
  keep = jax.random.bernoulli(inputs["key"], 0.5, x.shape)
  return x + jnp.where(keep, mlp(params, inputs, x), 0) * inputs["gain"]


def with_scan(params, inputs, x):
  return jax.lax.scan(lambda x, _: (mlp(params, inputs, x), None), x, None, length=3)[0]


LAYERS = [mlp, with_custom_rules, with_remat_inside, with_unused_and_shared, with_inputs, with_scan]


def example():
  a, b, x = (
    jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 6), (6, 4), (5, 4)])
  )
  params = {"a": a, "b": b}
  return params, {"key": jax.random.key(9), "gain": jnp.float64(1.5)}, x, jnp.cos(3 * x)


def run(cut, params, inputs, x, dy):
  """y, dx, dparams by F, I, W and again by F, B."""
  given = jax.tree.leaves((params, inputs))
  y, *kept = cut.forward(*given, x)
  dx, *waiting = cut.input_grad(*given, *kept, dy)
  dparams = cut.weight_grad(*given, *waiting)
  (same,) = cut.primal(*given, x)
  assert (same == y).all()
  assert [(k.shape, k.dtype) for k in kept] == [(k.shape, k.dtype) for k in cut.kept]
  assert [(k.shape, k.dtype) for k in waiting] == [(k.shape, k.dtype) for k in cut.waiting]
  return [y, dx, *dparams], [y, *cut.backward(*given, *kept, dy)]


@pytest.mark.smoke
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("policy", POLICY)
def test_the_parts_give_what_vjp_gives(float64, layer, policy):
  params, inputs, x, dy = example()
  y, back = jax.vjp(lambda params, x: layer(params, inputs, x), params, x)
  dparams, dx = back(dy)
  want = [y, dx, *jax.tree.leaves(dparams)]
  cut = split(layer, params, inputs, x, POLICY[policy])
  for got in run(cut, params, inputs, x, dy):
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-14, atol=1e-14)


def block():
  """One transformer layer with stand-in arguments, 32 positions long."""
  stack = tiny.stack(width=16, dropout=0.0)
  batch = tiny.batch(2, length=32)
  params = jax.tree.map(lambda p: p[0], stack.init(jax.random.key(0), batch)["layers"])
  rows = jnp.arange(2, dtype=jnp.int32)
  inputs = dict(batch=batch, key=None, layer=0, microbatch=0, rows=rows)
  layer = lambda params, inputs, x: stack.apply_layer(params, x, True, inputs)  # noqa: E731
  return layer, params, inputs, jax.random.normal(jax.random.key(1), (2, 32, 16))


def flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("policy", ["dots", "nothing"])
def test_under_rematerialization_w_still_holds_the_weight_gradients(float64, policy):
  """Left whole, a `checkpoint` equation would drag all of the backward pass into I, none into W."""
  layer, params, inputs, x = block()
  cut = split(layer, params, inputs, x, POLICY[policy])
  given = jax.tree.leaves((params, inputs))
  zeros = lambda shapes: [jnp.zeros(s.shape, s.dtype) for s in shapes]  # noqa: E731
  i = flops(cut.input_grad, *given, *zeros(cut.kept), x)
  w = flops(cut.weight_grad, *given, *zeros(cut.waiting))
  b = flops(cut.backward, *given, *zeros(cut.kept), x)
  matmuls = sum(2 * 64 * np.prod(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
  assert matmuls <= w <= 1.1 * matmuls
  assert abs(i + w - b) <= 0.03 * b


def test_scores_are_never_kept_nor_waited_for_by_default(float64):
  layer, params, inputs, x = block()
  cut = split(layer, params, inputs, x, POLICY["dots"])
  scores = lambda shapes: [s.shape for s in shapes if s.shape[-2:] == (32, 32)]  # noqa: E731
  assert not scores(cut.kept) and not scores(cut.waiting)
  assert scores(split(layer, params, inputs, x, POLICY["all"]).kept)  # so the test can see them


def test_what_depends_on_parameters_or_keys_alone_is_not_kept(float64):
  params, inputs, x, _ = example()
  cut = split(with_inputs, params, inputs, x, None)
  rows_of_x = [k.shape[0] == x.shape[0] and k.dtype == x.dtype for k in cut.kept]
  assert all(rows_of_x)  # no mask, no weight
