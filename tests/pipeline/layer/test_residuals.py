"""Residual policies beyond the three of our own: JAX's, names, functions; exact, and only once."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from networks import lm

import jaxpipe
from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.residuals import jax_policies, residual_policy
from jaxpipe.schedules import Kind
from jaxpipe.schedules.transforms.recompute import with_recompute

EVERY_NAME = "names:query,key,value,attention,attention_out,mlp_up,mlp_gate"


def no_scores(primitive, *avals, **params):
  """A policy as a user may write it: matmuls, but none of a row with itself."""
  return primitive.name == "dot_general" and avals[0].shape[-1] != avals[1].shape[-1]


POLICIES = [
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
  "everything_saveable",
  "nothing_saveable",
  "names:attention,mlp_up",
  EVERY_NAME,
  no_scores,
]
GRID = list(itertools.product(POLICIES, ("zb-h1", "1f1b"), (False, True)))


@pytest.mark.sampled("residuals, name, recompute", GRID, 2)
def test_gradients_are_those_of_the_unpipelined_model(float64, residuals, name, recompute):
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=3)
  schedule = with_recompute(schedule) if recompute else schedule
  stack, mesh = lm.stack(2), jaxpipe.make_mesh("stage:2")
  report = jaxpipe.check(stack, schedule, mesh, lm.batch(6), residuals=residuals, unroll="none")
  assert report.ok and report.tolerance == 1e-12, str(report)


def test_the_reference_takes_every_policy(float64):
  stack, batch = lm.stack(2, dropout=0.0), lm.batch(4)
  params = stack.init(jax.random.key(0), batch)
  _, want = jaxpipe.reference_value_and_grad(stack, 2)(params, batch)
  for residuals in ("names:attention", no_scores):
    _, got = jaxpipe.reference_value_and_grad(stack, 2, residuals)(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, want)


def block(length=32):
  """A transformer layer that differentiates on its own, and its arguments."""
  stack, batch = lm.stack(width=16, dropout=0.0), lm.batch(2, length=length)
  params = jax.tree.map(lambda p: p[0], stack.init(jax.random.key(0), batch)["layers"])
  rows = jnp.arange(2, dtype=jnp.int32)
  inputs = dict(batch=batch, key=None, layer=0, microbatch=0, rows=rows)
  layer = lambda params, inputs, x: stack.apply_layer(params, x, True, inputs)  # noqa: E731
  return layer, params, inputs, jnp.zeros((2, length, 16))


def cut(residuals, recompute=False, args=None):
  args = args or block()
  return residual_policy(residuals).traced(lambda keep: lm.split(*args, keep, recompute=recompute))


# B=2 rows, T=32 positions, D=16, N=2 heads over K=1, F=64.
BY_NAME = {
  "query": (2, 32, 2, 8),
  "key": (2, 32, 1, 8),
  "value": (2, 32, 1, 8),
  "attention": (2, 32, 16),
  "attention_out": (2, 32, 16),
  "mlp_up": (2, 32, 64),
  "mlp_gate": (2, 32, 64),
}


@pytest.mark.parametrize("names", [["attention", "mlp_up"], ["key"], list(BY_NAME)])
def test_f_keeps_its_input_and_what_is_named(float64, names):
  saved = cut(f"names:{','.join(names)}").saved
  kept = collections.Counter(value.shape for value in saved if value.made is Kind.F)
  x = [(2, 32, 16)]
  assert kept == collections.Counter([*x, *(BY_NAME[name] for name in names)])


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_saveable_keeps_the_input_of_each_layer(float64, recompute):
  saved = cut("nothing_saveable", recompute).saved
  assert [value.shape for value in saved if value.made is Kind.F] == [(2, 32, 16)]


def test_a_name_makes_no_second_copy(float64):
  """Named or not, one value is one variable: else R would leave what F has kept once more."""
  params, x = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 4))}, jnp.ones((5, 4))

  def layer(name):
    squared = lambda h: h * h  # noqa: E731 - its derivative reads h itself
    return lambda params, inputs, x: x + squared(name(x @ params["a"])) @ params["b"]

  cuts = [
    cut("dots", True, (layer(name), params, {}, x))
    for name in (lambda value: value, lambda value: checkpoint_name(value, "hidden"))
  ]
  plain, named = ([(v.shape, v.made, v.last) for v in one.saved] for one in cuts)
  assert plain == named


def moving(part, given):
  """The equations of a slice that differ between microbatches."""
  reached = eq.depends(part.equations, part.inputs[given:])
  return [e for e in part.equations if any(v in reached for v in e.outvars)]


@pytest.mark.parametrize("residuals", ["dots", "all", *POLICIES])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_equation_runs_twice(float64, residuals, recompute):
  args = block(4)
  one, given = cut(residuals, recompute, args), len(jax.tree.leaves(args[1:3]))
  parts = [one.forward, one.recompute, one.input_grad, one.weight_grad]
  runs = collections.Counter(e for part in parts if part for e in map(id, moving(part, given)))
  assert set(runs.values()) == {1}


def flops(part):
  args = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in part.inputs] if part else []
  return jax.jit(part).lower(*args).compile().cost_analysis()["flops"] if part else 0


# Multiplications a token that R repeats. That with `down` is never among them: nobody reads y.
MATMULS = dict(query=16 * 16, key=16 * 8, value=16 * 8, out=16 * 16, mlp_up=1024, mlp_gate=1024)
SCORES = MIXING = 32 * 16
REPEATED = {
  "everything_saveable": 0,
  "dots_saveable": 0,
  "dots": SCORES + MIXING,
  "names:attention,mlp_up": sum(MATMULS.values()) - MATMULS["mlp_up"] + SCORES,
  EVERY_NAME: SCORES,
  "nothing_saveable": sum(MATMULS.values()) + SCORES + MIXING,
}


@pytest.mark.parametrize("residuals", REPEATED)
def test_r_repeats_what_f_dropped_and_nobody_else_does(float64, residuals):
  """I and W then cost what they cost where everything was kept."""
  whole, one = cut("all", True), cut(residuals, True)
  for part in ("input_grad", "weight_grad", "backward"):
    np.testing.assert_allclose(flops(getattr(one, part)), flops(getattr(whole, part)), rtol=0.01)
  matmuls = 2 * 64 * REPEATED[residuals]
  elementwise = 0.15 * flops(whole.forward)
  assert matmuls <= flops(one.recompute) <= matmuls + elementwise
  assert (one.recompute is None) == (residuals == "everything_saveable")


def test_a_name_inside_a_loop_is_kept_for_every_iteration(float64):
  def layer(params, inputs, x):
    body = lambda x, _: (checkpoint_name(jnp.sin(x @ params), "turn"), None)  # noqa: E731
    return jax.lax.scan(body, x, None, length=3)[0]

  saved = cut("names:turn", args=(layer, jnp.ones((4, 4)), {}, jnp.ones((5, 4)))).saved
  assert (3, 5, 4) in [value.shape for value in saved if value.made is Kind.F]


def test_jax_policies_are_those_that_need_no_arguments():
  wanted = {"everything_saveable", "nothing_saveable", "dots_saveable", "checkpoint_dots"}
  found = jax_policies()
  assert wanted <= set(found)
  factories = {"save_only_these_names", "save_from_both_policies", "offload_dot_with_no_batch_dims"}
  assert not factories & set(found)


@pytest.mark.parametrize(
  "residuals, message",
  [
    ("some", r"residuals 'some' is unknown; use one of auto, all, dots, full, .*nothing_saveable"),
    ("dots_savable", r"did you mean dots_saveable\?"),
    ("save_only_these_names", r"'save_only_these_names' is unknown; .* or names:A,B"),
    ("names:", r"'names:' has an empty name; write names:A,B"),
    ("names:a,,b", r"has an empty name"),
    (jax.checkpoint_policies.save_only_these_names, r"save_only_these_names is no policy"),
    (3, r"residuals int is no policy"),
  ],
)
def test_what_is_no_policy(residuals, message):
  with pytest.raises(ValueError, match=message):
    residual_policy(residuals)


UNKNOWN_NAME = (
  r"no checkpoint_name in the layer is 'atention'; there are attention, attention_out, key,"
  r" mlp_gate, mlp_up, query, value; did you mean attention\?"
)


def test_a_name_that_no_layer_bears(float64):
  stack, batch, mesh = lm.stack(2, dropout=0.0), lm.batch(4), jaxpipe.make_mesh("stage:2")
  schedule, names = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2), "names:key,atention"
  params = stack.init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match=UNKNOWN_NAME):
    jaxpipe.reference_value_and_grad(stack, 2, names)(params, batch)
  placed = jaxpipe.place(params, stack, schedule, mesh)
  with pytest.raises(ValueError, match=UNKNOWN_NAME):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, residuals=names)(placed, batch)
  with pytest.raises(ValueError, match=UNKNOWN_NAME):
    jaxpipe.memory_report(stack, schedule, mesh, batch, residuals=names)


def test_names_where_there_are_none(float64):
  layer = lambda params, inputs, x: x @ params  # noqa: E731
  with pytest.raises(ValueError, match=r"is 'a'; there are none$"):
    cut("names:a", args=(layer, jnp.ones((4, 4)), {}, jnp.ones((5, 4))))


def test_a_policy_that_moves_values_to_the_host_is_refused(float64):
  offload = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
  with pytest.raises(ValueError, match=r"moves dot_general to .*pinned_host; use one that only"):
    cut(offload)
