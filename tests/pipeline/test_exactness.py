"""The pipeline against the unpipelined model, leaf by leaf, in float64.

The whole grid: `./launch/test.sh tests/pipeline/test_exactness.py --whole-grid`.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from networks import lm
from networks.drawn import drawn

import jaxpipe
from jaxpipe.parallel.placing import layer_paths
from jaxpipe.pipeline.check import leaf_errors
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.unroll import segments
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.transforms.recompute import with_recompute

TOLERANCE = 1e-12

GRID = [
  (P, M, data, *rest)
  for P, M, data in itertools.product((1, 2, 4), range(1, 9), (1, 2))
  for rest in itertools.product(("gpipe", "1f1b"), ("fused", "split"), ("full", "dots", "all"))
]


@pytest.fixture(scope="module")
def oracle():
  """Loss, metrics and gradients of the reference, by (M, rows); each is computed once."""
  seen = {}

  def reference(M, rows):
    if (M, rows) not in seen:
      stack, batch, key = lm.stack(), lm.batch(rows), jax.random.key(7)
      params = drawn(stack)
      run = jaxpipe.reference_value_and_grad(stack, microbatches=M)
      seen[M, rows] = (stack, params, batch, key, jax.device_get(run(params, batch, key)))
    return seen[M, rows]

  return reference


@pytest.mark.sampled("P, M, data, name, backward, residuals", GRID, 6)
def test_gradients_are_those_of_the_unpipelined_model(
  float64, oracle, P, M, data, name, backward, residuals
):
  stack, params, batch, key, ((loss, metrics), grads) = oracle(M, 2 * M)
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=M, backward=backward)
  mesh = jaxpipe.make_mesh(f"stage:{P},data:{data}")
  step = jaxpipe.pipeline_value_and_grad(
    stack, schedule, mesh, residuals=residuals, unroll="none", poison=True
  )
  (got_loss, got_metrics), got = step(jaxpipe.place(params, stack, schedule, mesh), batch, key)
  np.testing.assert_allclose(got_loss, loss, rtol=TOLERANCE)
  assert got_metrics == metrics
  errors = leaf_errors(jaxpipe.unplace(got, stack, schedule), grads)
  assert len(errors) == 11 and max(errors.values()) <= TOLERANCE, errors


def _sizes(family):
  for P, V in itertools.product((1, 2, 3, 4, 8), sorted({family.chunks, 1, 2, 3, 4})):
    if family.fits(P, V):
      yield P, V


# Slack, program shape and policy are dealt in turn to the cases of the grid.
OPTIONS = itertools.cycle(
  itertools.product((0, 1), ("none", "ends", "none", "all", "none"), ("full", "dots", "all"))
)
EVERY = [
  (name, P, V, M, *next(OPTIONS))
  for name, family in FAMILIES.items()
  for P, V in _sizes(family)
  for M in sorted({1, 2, P - 1, P, P + 1, 2 * P, 3 * P + 1} - {0})
]


@functools.cache
def unpipelined(M, paths, layers):
  """A stack of so many layers, its inputs, and loss and gradients of the reference."""
  stack, batch, key = lm.stack(layers), lm.batch(M), jax.random.key(7)
  params = drawn(stack)
  run = jaxpipe.reference_value_and_grad(stack, M, paths=paths)
  (loss, _), grads = jax.device_get(run(params, batch, key))
  return stack, params, batch, key, loss, grads


@pytest.mark.sampled("name, P, V, M, slack, unroll, residuals", EVERY, 5)
def test_every_registered_schedule_is_exact(float64, name, P, V, M, slack, unroll, residuals):
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=M, chunks=V)
  if schedule.stages * M > 8:
    unroll = "none"  # straight lines of many ticks take long to compile
  stack, params, batch, key, want, grads = unpipelined(
    M, layer_paths(schedule.stages, schedule), schedule.stages
  )
  mesh = jaxpipe.make_mesh(f"stage:{P}")
  step = jaxpipe.pipeline_value_and_grad(
    stack, schedule, mesh, residuals=residuals, slack=slack, unroll=unroll, poison=True
  )
  (loss, _), got = step(jaxpipe.place(params, stack, schedule, mesh), batch, key)
  np.testing.assert_allclose(loss, want, rtol=TOLERANCE)
  errors = leaf_errors(jaxpipe.unplace(got, stack, schedule), grads)
  assert len(errors) == 11 and max(errors.values()) <= TOLERANCE, errors


# Loops with straight ends: they take half a minute to compile.
STEADY = list(
  itertools.product(("gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zb-v"), (2, 3), (0, 1))
)


@pytest.mark.slow
@pytest.mark.sampled("name, P, slack", STEADY, 1)
def test_loops_with_straight_ends_are_exact(float64, name, P, slack):
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=4 * P)
  parts = segments(lower(schedule, slack=slack), "ends")
  assert {True, False} == {segment.repeats > 1 for segment in parts}
  stack, batch = lm.stack(schedule.stages), lm.batch(4 * P)
  mesh = jaxpipe.make_mesh(f"stage:{P}")
  options = dict(params=drawn(stack), slack=slack, unroll="ends")
  report = jaxpipe.check(stack, schedule, mesh, batch, **options)
  assert report.ok, str(report)


RECOMPUTED = list(itertools.product(["gpipe", "zb-v", "chimera"], ["full", "dots", "all"]))


@pytest.mark.sampled("name, residuals", RECOMPUTED, 2)
def test_recompute_as_an_action_of_its_own_is_exact(float64, name, residuals):
  schedule = with_recompute(jaxpipe.make_schedule(name, devices=2, microbatches=4))
  stack = lm.stack(schedule.stages)
  report = jaxpipe.check(
    stack,
    schedule,
    jaxpipe.make_mesh("stage:2,data:2"),
    lm.batch(8),
    params=drawn(stack),
    residuals=residuals,
    unroll="none",
  )
  assert report.ok, str(report)


def test_replicas_of_a_stage_are_stored_once(float64):
  """Counted twice, a weight would count twice in the gradient's norm, and clipping with it."""
  schedule = jaxpipe.make_schedule("chimera", devices=4, microbatches=4)
  stack = lm.stack(8)
  params = drawn(stack)
  placed = jaxpipe.place(params, stack, schedule, jaxpipe.make_mesh("stage:4"))
  same = [a.shape == b.shape for a, b in zip(*map(jax.tree.leaves, (params, placed)), strict=True)]
  assert all(same)


ORDERS = {
  "interleaved": (
    "loop",
    [
      "0F0 0F1 2F0 2F1 0F2 2F2 2I0 2W0 2I1 0I0 0I1 2B2 0W0 2W1 0W1 0B2",
      "1F0 1F1 3F0 3I0 3F1 3I1 1F2 1I0 1W0 1I1 3F2 3B2 3W0 3W1 1B2 1W1",
    ],
  ),
  "v": (
    "v",
    ["0F0 0F1 3F0 3I0 3F1 3I1 0I0 3W0 0I1 3W1 0W0 0W1", "1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1"],
  ),
}


@pytest.mark.sampled("name, data", list(itertools.product(ORDERS, [1, 2])), 1)
def test_a_schedule_written_by_hand_runs_exactly(float64, oracle, name, data):
  """Several chunks a device, folds within a device, B beside I and W in one schedule."""
  placement, order = ORDERS[name]
  schedule = jaxpipe.Schedule.from_tokens([row.split() for row in order], placement=placement)
  stack, params, batch, key, ((loss, _), grads) = oracle(schedule.microbatches, 12)
  mesh = jaxpipe.make_mesh(f"stage:2,data:{data}")
  placed = jaxpipe.place(params, stack, schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none", poison=True)
  (got_loss, _), got = step(placed, batch, key)
  np.testing.assert_allclose(got_loss, loss, rtol=TOLERANCE)
  assert max(leaf_errors(jaxpipe.unplace(got, stack, schedule), grads).values()) <= TOLERANCE


@pytest.mark.smoke
@pytest.mark.sampled("name", ["gpipe", "1f1b"], 1)
def test_float32_and_the_default_attention(name):
  stack = lm.stack(dtype="float32", param_dtype="float32", attention=jax.nn.dot_product_attention)
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=3, backward="split")
  report = jaxpipe.check(
    stack, schedule, jaxpipe.make_mesh("stage:2"), lm.batch(6), params=drawn(stack), unroll="none"
  )
  assert report.tolerance == 1e-5 and report.ok, str(report)


def test_bfloat16_arithmetic_keeps_float32_sums():
  stack = lm.stack(dtype="bfloat16", param_dtype="float32", attention=jax.nn.dot_product_attention)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  mesh = jaxpipe.make_mesh("stage:2")
  batch = lm.batch(4)
  params = drawn(stack)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none")
  placed = jaxpipe.place(params, stack, schedule, mesh)
  (loss, _), grads = jax.eval_shape(step, placed, batch, jax.random.key(1))
  assert {loss.dtype, *(g.dtype for g in jax.tree.leaves(grads))} == {np.dtype("float32")}
  # The same bfloat16 operations in the same order.
  report = jaxpipe.check(stack, schedule, mesh, batch, params=params, unroll="none")
  assert report.ok, str(report)


def test_evaluation_is_the_loss_without_dropout(float64, oracle):
  schedule = jaxpipe.make_schedule("1f1b", devices=4, microbatches=3)
  mesh = jaxpipe.make_mesh("stage:4,data:2")
  plain, batch = lm.stack(dropout=0.0), lm.batch(6)
  params = drawn(plain)
  (loss, metrics), _ = jaxpipe.reference_value_and_grad(plain, microbatches=3)(params, batch)
  evaluate = jaxpipe.pipeline_forward(lm.stack(), schedule, mesh, poison=True)
  got_loss, got_metrics = evaluate(jaxpipe.place(params, plain, schedule, mesh), batch)
  np.testing.assert_allclose(got_loss, loss, rtol=TOLERANCE)
  assert got_metrics == metrics


def test_dropout_masks_depend_on_the_step_and_not_on_schedule_or_mesh(float64, sample_grid):
  """Losses of two steps differ; those of one step do not, wherever its rows lie."""
  stack, batch = lm.stack(), lm.batch(8)
  params = drawn(stack)

  def losses(name, mesh):
    mesh = jaxpipe.make_mesh(mesh)
    schedule = jaxpipe.make_schedule(name, devices=mesh.shape["stage"], microbatches=2)
    step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none")
    placed = jaxpipe.place(params, stack, schedule, mesh)
    return [float(step(placed, batch, jax.random.key(seed))[0][0]) for seed in (3, 4)]

  first, second = losses("1f1b", "stage:2")
  assert abs(first - second) > 1e-6
  others = [("gpipe", "stage:4"), ("1f1b", "stage:1,data:4"), ("gpipe", "stage:2,data:2")]
  for name, mesh in sample_grid(others, 1):
    np.testing.assert_allclose(losses(name, mesh), [first, second], rtol=TOLERANCE)


@pytest.mark.parametrize("factor", [1 + 1e-6, np.nan])
def test_the_oracle_fails_when_a_gradient_is_wrong(float64, monkeypatch, factor):
  """Layers' gradients off by one part in a million, or NaN; the loss is not touched."""
  from jaxpipe.pipeline.storage import rings

  exact = rings.add
  monkeypatch.setattr(
    rings,
    "add",
    lambda ring, value, *at: exact(ring, jax.tree.map(lambda v: v * factor, value), *at),
  )
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  mesh = jaxpipe.make_mesh("stage:2")
  stack = lm.stack(2)
  report = jaxpipe.check(stack, schedule, mesh, lm.batch(4), params=drawn(stack), unroll="none")
  assert report.loss_error == report.metrics_error == 0 and not report.ok
  assert sum(error > 1e-12 for error in report.errors.values()) == 9  # the layers' leaves
