"""Memory is the schedule's: the compiler's own figure, minus a constant, is slots times bytes."""

import jax
import pytest
import tiny

import jaxpipe

F32 = dict(dtype="float32", param_dtype="float32", attention=jax.nn.dot_product_attention)


def measure(name, backward, residuals, M):
  """Temporary bytes of the compiled step, and those that the rings were expected to take."""
  stack = tiny.stack(4, **F32, width=32, dropout=0.0)
  mesh = jaxpipe.make_mesh("stage:4")
  schedule = jaxpipe.make_schedule(name, devices=4, microbatches=M, backward=backward)
  batch = tiny.batch(2 * M, length=32)
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  # One shape for all: what ticks outside the loop take is no ring's.
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, residuals=residuals, unroll="none")
  compiled = jax.jit(step).lower(params, batch).compile()
  expected = jaxpipe.expected_memory(stack, schedule, mesh, batch, residuals=residuals)
  rings = sum(expected[k] for k in ("activations", "gradient_ring", "saved"))
  return (
    compiled.memory_analysis().temp_size_in_bytes,
    rings,
    max(jaxpipe.simulate(schedule).peak_activations),
  )


@pytest.mark.parametrize(
  "residuals, backward", [("dots", "fused"), ("all", "split"), ("full", "fused")]
)
def test_1f1b_is_flat_in_m_and_gpipe_grows_as_the_simulator_says(residuals, backward):
  flat = [measure("1f1b", backward, residuals, M) for M in (8, 16, 32)]
  grows = [measure("gpipe", backward, residuals, M) for M in (8, 16, 32)]
  fixed = grows[0][0] - grows[0][1]
  # The table itself is some hundred bytes a microbatch.
  assert max(t for t, _, _ in flat) - min(t for t, _, _ in flat) <= 0.01 * flat[0][0]
  per_peak = (grows[1][1] - grows[0][1]) / (grows[1][2] - grows[0][2])
  for temporary, rings, peak in [*flat, *grows]:
    assert abs(temporary - fixed - rings) <= 0.1 * rings + 0.02 * fixed, (temporary, fixed, rings)
    # And in the simulator's own unit: chunks held.
    if (temporary, rings, peak) in grows:
      growth = temporary - grows[0][0]
      assert abs(growth - per_peak * (peak - grows[0][2])) <= 0.1 * max(growth, per_peak)


def test_parameters_and_gradients_are_counted_exactly():
  stack = tiny.stack(8, **F32)
  mesh = jaxpipe.make_mesh("stage:4")
  schedule = jaxpipe.make_schedule("1f1b", devices=4, microbatches=4)
  batch = tiny.batch(8)
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  on_first = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(params)
    for shard in leaf.addressable_shards
    if shard.device == jax.devices()[0]
  )
  expected = jaxpipe.expected_memory(stack, schedule, mesh, batch)
  assert expected["parameters"] == on_first
  # A tied table is summed where it embeds and where it is the head's.
  assert expected["gradients"] == on_first + params["embed"]["table"].nbytes
