"""A layer cut in three against `jax.vjp` of the whole layer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import lm

from jaxpipe.pipeline.layer.residuals import POLICIES
from jaxpipe.schedules import Kind

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
  """y, dx, dparams by F, R, I, W and again by F, R, B."""
  given = jax.tree.leaves((params, inputs))
  saved = {}

  def act(slice_, *args):
    out = slice_(*given, *(saved[n] for n in slice_.reads), *args)
    wanted = len(out) - len(slice_.makes)
    for n, value in zip(slice_.makes, out[wanted:], strict=True):
      assert (value.shape, value.dtype) == (cut.saved[n].shape, cut.saved[n].dtype)
      saved[n] = value
    return out[:wanted]

  (y,) = act(cut.forward, x)
  (same,) = act(cut.primal, x)
  assert (same == y).all()
  if cut.recompute is not None:
    act(cut.recompute)
  fused = [y, *act(cut.backward, dy)]
  (dx,) = act(cut.input_grad, dy)
  return [y, dx, *act(cut.weight_grad)], fused


def shapes(cut, made, last=(Kind.R, Kind.I, Kind.W)):
  """Shapes of the values that actions of kind `made` leave for those of kinds `last`."""
  return [value.shape for value in cut.saved if value.made is made and value.last in last]


def reads(cut, slice_):
  return [jnp.zeros(cut.saved[n].shape, cut.saved[n].dtype) for n in slice_.reads]


@pytest.mark.smoke
@pytest.mark.sampled(
  "layer, policy, recompute",
  [
    pytest.param(layer, policy, recompute, id=f"{layer.__name__}-{policy}-{recompute}")
    for layer, policy, recompute in itertools.product(LAYERS, POLICY, (False, True))
  ],
  20,
)
def test_the_parts_give_what_vjp_gives(float64, layer, policy, recompute):
  params, inputs, x, dy = example()
  y, back = jax.vjp(lambda params, x: layer(params, inputs, x), params, x)
  dparams, dx = back(dy)
  want = [y, dx, *jax.tree.leaves(dparams)]
  cut = lm.split(layer, params, inputs, x, POLICY[policy], recompute=recompute)
  for got in run(cut, params, inputs, x, dy):
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-14, atol=1e-14)


def block():
  """One transformer layer with stand-in arguments, 32 positions long."""
  stack = lm.stack(width=16, dropout=0.0)
  batch = lm.batch(2, length=32)
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
  cut = lm.split(layer, params, inputs, x, POLICY[policy])
  given = jax.tree.leaves((params, inputs))
  i = flops(cut.input_grad, *given, *reads(cut, cut.input_grad), x)
  w = flops(cut.weight_grad, *given, *reads(cut, cut.weight_grad))
  b = flops(cut.backward, *given, *reads(cut, cut.backward), x)
  matmuls = sum(2 * 64 * np.prod(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
  assert matmuls <= w <= 1.1 * matmuls
  assert abs(i + w - b) <= 0.03 * b


def test_scores_are_never_kept_nor_waited_for_by_default(float64):
  layer, params, inputs, x = block()
  scores = lambda cut: [v.shape for v in cut.saved if v.shape[-2:] == (32, 32)]  # noqa: E731
  assert not scores(lm.split(layer, params, inputs, x, POLICY["dots"]))
  assert scores(lm.split(layer, params, inputs, x, POLICY["all"]))  # so the test can see them


def test_with_a_recompute_of_its_own_the_backward_repeats_nothing(float64):
  """Under full rematerialization I and W then cost what they cost where everything was kept."""
  layer, params, inputs, x = block()
  given = jax.tree.leaves((params, inputs))
  cost = {}
  for name, policy in (("all", None), ("nothing", POLICY["nothing"])):
    cut = lm.split(layer, params, inputs, x, policy, recompute=True)
    cost[name] = [
      flops(cut.input_grad, *given, *reads(cut, cut.input_grad), x),
      flops(cut.weight_grad, *given, *reads(cut, cut.weight_grad)),
    ]
    assert shapes(cut, Kind.F) == [x.shape] or name == "all"
    assert (cut.recompute is None) == (name == "all")
  np.testing.assert_allclose(cost["nothing"], cost["all"], rtol=0.03)


def test_what_depends_on_parameters_or_keys_alone_is_not_kept(float64):
  params, inputs, x, _ = example()
  cut = lm.split(with_inputs, params, inputs, x, None)
  kept = [value for value in cut.saved if value.made is Kind.F]
  rows_of_x = [k.shape[0] == x.shape[0] and k.dtype == x.dtype for k in kept]
  assert all(rows_of_x)  # no mask, no weight
