"""The baselines against the unpipelined model, leaf by leaf, in float64: they are fair only if
they compute the same.
"""

import jax
import pytest
from networks import lm
from networks.drawn import drawn, placed_shapes

import jaxpipe
from experiments.baselines import scan_gpipe_value_and_grad, vmap_roll_value_and_grad
from jaxpipe.pipeline.check import leaf_errors

BASELINES = (vmap_roll_value_and_grad, scan_gpipe_value_and_grad)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.sampled("P, M, residuals", [(2, 3, "names:attention"), (4, 4, "full")], 1)
def test_gradients_are_the_reference_s(baseline, P, M, residuals, float64):
  stack, batch, key = lm.stack(), lm.batch(2 * M), jax.random.key(7)
  params = drawn(stack)
  (loss, metrics), grads = jaxpipe.reference_value_and_grad(stack, M)(params, batch, key)
  mesh = jaxpipe.make_mesh(f"stage:{P}")
  schedule = jaxpipe.make_schedule("gpipe", devices=P, microbatches=M)
  placed = jaxpipe.place(params, stack, schedule, mesh)
  got = baseline(stack, P, M, mesh, residuals)(placed, batch, key)
  errors = leaf_errors(got[1], grads)
  assert max(errors.values()) <= 1e-12, errors
  assert abs(got[0][0] - loss) <= 1e-12 * abs(loss)
  assert got[0][1] == metrics
  for leaf in jax.tree.leaves(got[1]["layers"]):
    assert leaf.sharding.spec[0] == "stage"


@pytest.mark.parametrize("baseline", BASELINES)
def test_no_device_holds_another_s_layers(baseline):
  """The partitioner must not gather the weights, nor run all stages on every device."""
  stack, batch = lm.stack(dtype="float32", param_dtype="float32"), lm.batch(8)
  mesh = jaxpipe.make_mesh("stage:4")
  schedule = jaxpipe.make_schedule("gpipe", devices=4, microbatches=4)
  params = placed_shapes(stack, schedule, mesh)
  step = baseline(stack, 4, 4, mesh)
  text = step.lower(params, batch, jax.random.key(0)).compile().as_text()
  assert "collective-permute" in text
  hidden = params["layers"]["up"]["kernel"].shape
  assert hidden[0] == 4
  whole = "f32[" + ",".join(map(str, hidden))
  assert whole not in text
  assert f"f32[1,{hidden[1]},{hidden[2]}]" in text


@pytest.mark.parametrize("baseline", BASELINES)
def test_what_cannot_run_is_refused(baseline):
  stack = lm.stack(dtype="float32", param_dtype="float32")
  with pytest.raises(ValueError, match="4 layers cannot fill 3 stages"):
    baseline(stack, 3, 4, jaxpipe.make_mesh("stage:3"))
  with pytest.raises(ValueError, match="wants stage:2 alone"):
    baseline(stack, 2, 4, jaxpipe.make_mesh("stage:2,data:2"))
  with pytest.raises(ValueError, match="residuals 'some' is unknown"):
    baseline(stack, 2, 4, jaxpipe.make_mesh("stage:2"), "some")


def test_vmap_keeps_the_matmuls_unless_it_is_asked_not_to():
  """`vmap` gives every matmul a batch dim, which hides it from the usual policy."""
  stack, batch = lm.stack(2, dtype="float32", param_dtype="float32"), lm.batch(16)
  mesh = jaxpipe.make_mesh("stage:2")
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=8)
  params = placed_shapes(stack, schedule, mesh)

  def temporary(baseline, **options):
    lowered = baseline(stack, 2, 8, mesh, **options).lower(params, batch, jax.random.key(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  seeing = temporary(vmap_roll_value_and_grad)
  assert seeing > 0.8 * temporary(scan_gpipe_value_and_grad)
  assert temporary(vmap_roll_value_and_grad, blind_policy=True) < 0.8 * seeing
