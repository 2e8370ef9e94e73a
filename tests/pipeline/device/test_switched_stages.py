"""Unlike stages against the unpipelined model, leaf by leaf, in float64.

The whole grid: `./launch/test.sh tests/pipeline/device/test_switched_stages.py --whole-grid`.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import unlike
from networks.drawn import drawn, drawn_state

import jaxpipe
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.stack.stack import LayerStack, StackError

STACKS = {
  "convolutions": (unlike.convolutions, unlike.images),
  "language": (unlike.language, unlike.text),
}
# P=1 has every stage on one device; 8 stages of 5 layers leave some of them empty.
MESHES = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1))
# Policies, slack and program shape are dealt in turn to the cases of the grid.
GRID = [
  (
    stack,
    name,
    P,
    data,
    i // 3 % 2,
    ("full", "dots", "all")[i % 3],
    "auto" if i % 5 == 4 else "none",
  )
  for i, (stack, (P, data), name) in enumerate(itertools.product(STACKS, MESHES, FAMILIES))
  if name != "skippipe" and not (name in ("chimera", "bitpipe", "dualpipe") and P == 1)
]


def check(stack, *where, **options):
  """`jaxpipe.check` from drawn values, which need not be compiled, in one loop by default."""
  values = dict(params=drawn(stack), state=drawn_state(stack))
  return jaxpipe.check(stack, *where, **{**values, "unroll": "none", **options})


@pytest.mark.sampled("stack, name, P, data, slack, residuals, unroll", GRID, 4)
def test_gradients_and_state_are_those_of_the_unpipelined_model(
  float64, stack, name, P, data, slack, residuals, unroll
):
  make, batch = STACKS[stack]
  M = max(4, P)
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=M)
  mesh = jaxpipe.make_mesh(f"stage:{P},data:{data}")
  options = dict(residuals=residuals, slack=slack, unroll=unroll)
  report = check(make(), schedule, mesh, batch(2 * M), **options)
  assert report.ok, report
  assert len(report.state_errors) == (8 if stack == "convolutions" else 0)


@pytest.mark.sampled("partition", [(5, 0), (0, 5), (1, 4), (3, 2)], 2)
def test_any_partition_gives_the_same(float64, partition):
  schedule = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=2)
  stack, mesh = unlike.language(partition=partition), jaxpipe.make_mesh("stage:2")
  assert check(stack, schedule, mesh, unlike.text(4)).ok


@pytest.mark.sampled("residuals", ["full", "dots"], 1)
def test_recomputation_as_an_action_of_its_own(float64, residuals):
  options = dict(devices=2, microbatches=4, recompute=True)
  schedule, mesh = jaxpipe.make_schedule("zb-h1", **options), jaxpipe.make_mesh("stage:2")
  report = check(unlike.convolutions(), schedule, mesh, unlike.images(8), residuals=residuals)
  assert report.ok, report


@pytest.mark.sampled("mesh", ["stage:2,fsdp:2", "stage:2,expert:2"], 1)
def test_rows_are_cut_over_any_axis_that_rows_lie_over(float64, mesh):
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  report = check(unlike.convolutions(), schedule, jaxpipe.make_mesh(mesh), unlike.images(8))
  assert report.ok, report


def test_frozen_weights_cost_no_gradient_and_stay(float64):
  frozen = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("base")))
  stack, batch = unlike.language(trainable=frozen, tied={}), unlike.text(4)
  schedule, mesh = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=2), "stage:2"
  mesh = jaxpipe.make_mesh(mesh)
  report = check(stack, schedule, mesh, batch)
  assert report.ok and not any("base" in path for path in report.errors), report
  key = jax.random.key(3)
  trees = (drawn(stack), drawn_state(stack))
  params, state = (jaxpipe.place(tree, stack, schedule, mesh) for tree in trees)
  # The program that the check compiled.
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none", poison=True)
  (_, _, after), grads = step(params, batch, key, state)
  jax.tree.map(np.testing.assert_array_equal, state, after)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
  assert shapes(grads) == shapes(params)


def test_weights_that_a_frozen_layer_would_wait_for_are_not_kept(float64):
  """W of a stage without trained weights reads nothing, so nothing waits for it."""
  schedule, mesh = (
    jaxpipe.make_schedule("zb-h1", devices=2, microbatches=4),
    jaxpipe.make_mesh("stage:2"),
  )
  saved = lambda **options: jaxpipe.memory_report(  # noqa: E731
    unlike.language(tied={}, **options), schedule, mesh, unlike.text(8), residuals="all"
  )
  trained, frozen = saved(), saved(trainable=nnx.PathContains("weights"))
  assert frozen.bytes["saved"] < trained.bytes["saved"] / 2
  assert frozen.bytes["gradients"] < trained.bytes["gradients"]


def test_a_moving_average_is_moved_once_a_step_by_the_mean_of_the_microbatches(float64):
  """By hand, for the first layer, whose input is the batch itself."""
  stack, batch, M = unlike.convolutions(), unlike.images(8), 2
  schedule, mesh = (
    jaxpipe.make_schedule("1f1b", devices=2, microbatches=M),
    jaxpipe.make_mesh("stage:2"),
  )
  key = jax.random.key(0)
  params, state = drawn(stack), stack.init_state(key, batch)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none")
  place = lambda tree: jaxpipe.place(tree, stack, schedule, mesh)  # noqa: E731
  (_, _, after), _ = step(place(params), batch, key, place(state))
  first = jax.tree.map(lambda leaf: leaf[0], params["layers"][0]["inner"])
  out = jax.lax.conv_general_dilated(
    jnp.asarray(batch["image"]),
    first["kernel"],
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  each = (out + first["bias"][None, None, None]).reshape(M, -1, 4)
  found = jaxpipe.unplace(after, stack, schedule)["layers"][0]["norm"]
  np.testing.assert_allclose(found["mean"][0], 0.01 * each.mean(1).mean(0), atol=1e-14)
  want = 0.99 + 0.01 * each.var(1).mean(0)
  np.testing.assert_allclose(found["var"][0], want, rtol=1e-12)


def test_every_layer_and_microbatch_has_a_mask_of_its_own():
  """The reference calls the same modules, and would not notice."""

  class Masks(nnx.Module):
    def __init__(self, rngs):
      pass

    def __call__(self, x, context):
      return (*x, context.dropout(jnp.ones((2, 64)), 0.5))

  stack = LayerStack(embed=unlike.Tokens, layers=[Masks, Masks], head=unlike.Predict)

  def mask(layer, microbatch):
    batch, key = unlike.text(2), jax.random.key(0)
    inputs = dict(batch=batch, key=key, layer=0, microbatch=microbatch, rows=jnp.arange(2))
    return stack.network.call(f"layers/{layer}", {}, {}, (), True, inputs)[0][0]

  masks = [mask(layer, microbatch) for layer in (0, 1) for microbatch in (0, 1)]
  for a, b in itertools.combinations([*masks, mask(0, 2)], 2):
    assert 0.25 < jnp.mean(a != b) < 0.75
  np.testing.assert_array_equal(mask(1, 1), masks[3])


def test_evaluation_uses_the_moving_averages(float64):
  stack, batch = unlike.convolutions(), unlike.images(8)
  schedule, mesh = (
    jaxpipe.make_schedule("1f1b", devices=2, microbatches=2),
    jaxpipe.make_mesh("stage:2"),
  )
  trees = params, state = drawn(stack), drawn_state(stack)
  placed = (jaxpipe.place(tree, stack, schedule, mesh) for tree in trees)
  evaluate = jaxpipe.pipeline_forward(stack, schedule, mesh, poison=True)
  placed_params, placed_state = placed
  loss, metrics = evaluate(placed_params, batch, placed_state)
  x = batch["image"]
  owned, states = stack.network.split(params), stack.network.split(state)
  for module in stack.network.specs:
    inputs = dict(batch=batch, key=None, layer=0, microbatch=0, rows=jnp.arange(8))
    x, _ = stack.network.call(module, owned[module], states[module], x, False, inputs)
  np.testing.assert_allclose(loss, x[0] / 8, rtol=1e-12)
  assert metrics["correct"] == x[1][1]["correct"]


def test_a_step_without_its_state_says_how_to_make_it():
  stack = unlike.convolutions()
  schedule, mesh = (
    jaxpipe.make_schedule("gpipe", devices=1, microbatches=1),
    jaxpipe.make_mesh("stage:1"),
  )
  batch = unlike.images(2)
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  with pytest.raises(ValueError, match=r"call step\(params, batch, key, state\)"):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)(params, batch, None)


def test_a_layer_that_cannot_take_what_it_is_given_is_named():
  stack = dataclasses.replace(unlike.convolutions(), layers=unlike.convolutions().layers[1:])
  with pytest.raises(StackError, match=r"layers\[0\] \(Convolution\) cannot be called with .*"):
    stack.init(jax.random.key(0), unlike.images(2))


def test_a_partition_of_other_layers_or_stages_is_refused():
  with pytest.raises(StackError, match=r"partition \[2, 2\] has 4 layers and the stack 5"):
    unlike.language(partition=[2, 2])
  stack, mesh = unlike.language(partition=[2, 3]), jaxpipe.make_mesh("stage:4")
  schedule = jaxpipe.make_schedule("gpipe", devices=4, microbatches=4)
  with pytest.raises(StackError, match="is for 2 stages and the schedule has 4"):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)


@pytest.mark.parametrize("name", ["skippipe", "vocabulary"])
def test_schedules_of_uniform_layers_alone_are_refused(name):
  options = {"head": "sharded"} if name == "vocabulary" else {}
  schedule = jaxpipe.make_schedule(
    "1f1b" if options else name, devices=2, microbatches=4, **options
  )
  with pytest.raises(StackError, match=r"(uniform layers|layers of one kind)"):
    jaxpipe.pipeline_value_and_grad(unlike.language(), schedule, jaxpipe.make_mesh("stage:2"))


def test_tied_paths_that_are_not_there_are_named():
  with pytest.raises(StackError, match="tied: body/table begins with no module"):
    unlike.language(tied={"body/table": "layers/0/table"})
  chain = {"head/table": "layers/0/table", "layers/0/table": "embed/table"}
  with pytest.raises(StackError, match="tied"):
    unlike.language(tied=chain)


def test_a_uniform_stack_stays_uniform():
  class Layer(nnx.Module):
    def __init__(self, rngs):
      self.inner = unlike.dense(rngs, 3, 3)

    def __call__(self, x, context):
      return self.inner(x)

  stack = LayerStack(embed=unlike.Images, layers=[Layer] * 3, head=unlike.Classify)
  assert stack.uniform and not dataclasses.replace(stack, partition=[1, 2]).uniform
