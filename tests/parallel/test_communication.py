"""What compiled steps send, against the formulas of the papers (`jaxpipe.parallel.formulas`)."""

import math

import jax
import numpy as np
import pytest
from networks.drawn import placed_shapes

import jaxpipe
from jaxpipe.models.transformer.decoder import TransformerConfig, transformer
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.parallel import formulas
from jaxpipe.pipeline.compiled.traffic import Traffic, traffic

# rows of a microbatch on a device, positions, width, layers, microbatches; bytes of a float32
B, S, D, L, M, ITEM = 2, 32, 16, 2, 4, 4


def sent(
  mesh,
  schedule="1f1b",
  *,
  residuals="dots",
  unroll="none",
  kv_heads=8,
  chunks=None,
  microbatches=M,
  **changes,
) -> Traffic:
  """Traffic of one step of a small transformer."""
  mesh = jaxpipe.make_mesh(mesh)
  sizes = dict(devices=mesh.shape["stage"], microbatches=microbatches)
  plan = jaxpipe.make_schedule(schedule, **sizes, chunks=chunks)
  shape = dict(vocabulary_size=64, width=D, heads=8, kv_heads=kv_heads, mlp_width=32)
  stack = transformer(TransformerConfig(**shape, layers=max(L, plan.stages), **changes))
  rows = B * microbatches * math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
  tokens = np.zeros((rows, S), np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((rows, S), np.float32)}
  params = placed_shapes(stack, plan, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, plan, mesh, residuals=residuals, unroll=unroll)
  return traffic(jax.jit(step).lower(params, batch).compile(), mesh, plan)


def of_action(found: Traffic, axis: str, kind: str, scope: str) -> tuple[int, float]:
  """Arrays and bytes of one run of an action inside the layers."""
  mine = [r for r in found.rows if (r.axes, r.kind, r.path) == ((axis,), kind, (scope,))]
  return sum(row.arrays for row in mine), sum(row.bytes for row in mine)


@pytest.mark.sampled(
  "schedule, back, t", [("1f1b", "B", 2), ("1f1b", "B", 4), ("zb-h1", "I", 2), ("zb-h1", "I", 4)], 2
)
def test_tensor_parallelism_is_four_all_reduces_a_layer_and_microbatch(t, schedule, back):
  found = sent(f"stage:2,tensor:{t}", schedule)
  forward = of_action(found, "tensor", "all-reduce", "F")
  backward = of_action(found, "tensor", "all-reduce", back)
  each = L // 2  # layers of a stage
  assert forward[0] == backward[0] == 2 * each
  assert forward[1] + backward[1] == each * formulas.tensor(B, S, D, t, ITEM)
  # W, which can wait, waits for nobody; and layers send nothing else.
  assert of_action(found, "tensor", "all-reduce", "W") == (0, 0)
  assert of_action(found, "tensor", "all-gather", "F") == (0, 0)


def test_positions_cut_over_tensor_send_the_same_bytes_in_other_pieces():
  t = 4
  found = sent(f"stage:1,tensor:{t}", positions_cut=True, residuals="all")
  gathers = [of_action(found, "tensor", "all-gather", scope) for scope in "FB"]
  scatters = [of_action(found, "tensor", "reduce-scatter", scope) for scope in "FB"]
  assert [n for n, _ in gathers + scatters] == [2 * L] * 4
  total = sum(size for _, size in gathers + scatters)
  assert (
    total == L * formulas.tensor_sequence(B, S, D, t, ITEM) == L * formulas.tensor(B, S, D, t, ITEM)
  )
  assert of_action(found, "tensor", "all-reduce", "F") == (0, 0)


@pytest.mark.sampled("residuals", ["dots", "selective"], 1)
def test_what_was_gathered_is_gathered_again_and_not_kept(residuals):
  found = sent("stage:1,tensor:2", positions_cut=True, residuals=residuals)
  assert of_action(found, "tensor", "all-gather", "B")[0] == 4 * L
  assert of_action(found, "tensor", "reduce-scatter", "B")[0] == 2 * L


@pytest.mark.sampled("c", [2, 4], 1)
def test_a_ring_passes_keys_and_values_by_all_others(c):
  found = sent(f"stage:1,sequence:{c}", kv_heads=4)
  arrays, size = of_action(found, "sequence", "all-gather", "F")
  assert arrays == 2 * (c - 1) * L
  assert size == L * formulas.ring_attention(B, S, D // 2, c, ITEM)


def test_ulysses_is_four_all_to_alls():
  found = sent("stage:1,sequence:4", ulysses=4)
  arrays, size = of_action(found, "sequence", "all-to-all", "F")
  assert arrays == 4 * L
  assert size == L * formulas.ulysses(B, S, D, 4, ITEM)
  assert of_action(found, "sequence", "all-gather", "F") == (0, 0)


def gathers(found: Traffic, scope: str | None) -> tuple[int, float]:
  """Gathers over `fsdp`: how often, and bytes of a step."""
  mine = [r for r in found.rows if r.axes == ("fsdp",) and r.kind == "all-gather"]
  mine = [r for r in mine if r.path == ((scope,) if scope else ())]
  return max((max(r.runs) for r in mine), default=0), sum(max(r.step_bytes) for r in mine)


def parameters(layers_only: bool, layers: int = L) -> int:
  config = TransformerConfig(
    vocabulary_size=64, layers=layers, width=D, heads=8, kv_heads=8, mlp_width=32
  )
  shapes = transformer(config).param_shapes()
  return sum(p.size for p in jax.tree.leaves(shapes["layers"] if layers_only else shapes))


@pytest.mark.sampled("schedule", ["1f1b", "looped-bfs"], 1)
def test_weights_are_gathered_once_a_step_whatever_the_number_of_microbatches(schedule):
  found = sent("stage:1,fsdp:4", schedule)
  times, size = gathers(found, None)
  assert times == 1 and gathers(found, "F") == gathers(found, "G") == (0, 0)
  scattered = sum(found.bytes(("fsdp",), "reduce-scatter"))
  # All are cut, so that all are scattered: the formula's float32 sums.
  want = formulas.fsdp(parameters(False), 4, gathers=1, scatters=1, itemsize=ITEM)
  assert size + scattered == want


def test_zeropp_gathers_a_stage_twice_a_unit():
  found = sent("stage:2,fsdp:2", "zeropp", chunks=2)
  times, size = gathers(found, "G")
  units = 2  # of M=4 microbatches, by the schedule's own choice for P=2
  assert times == 2 * 2 * units
  stage = formulas.fsdp(parameters(True, 4) // 4, 2, gathers=1, scatters=0, itemsize=ITEM)
  assert size == pytest.approx(times * stage)


def test_gathering_by_the_unit_takes_less_memory_than_once_a_step():
  """The ring of weights has a slot for what is gathered, and none for what never arrives."""
  mesh = jaxpipe.make_mesh("stage:2,fsdp:2")
  stack = transformer(
    TransformerConfig(vocabulary_size=16, layers=8, width=64, heads=2, kv_heads=2)
  )
  plan = jaxpipe.make_schedule("zeropp", devices=2, microbatches=4, chunks=2)
  whole = [[t for t in row if t[1] not in "GX"] for row in plan.tokens()]
  tokens = np.zeros((8, 4), np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((8, 4), np.float32)}

  def temporary(plan):
    params = placed_shapes(stack, plan, mesh)
    step = jaxpipe.pipeline_value_and_grad(stack, plan, mesh, unroll="none")
    compiled = jax.jit(step).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(plan) < temporary(jaxpipe.Schedule.from_tokens(whole))


def test_experts_exchange_twice_forward_and_twice_backward():
  moe = MoeConfig(experts=8, top_k=2, capacity_factor=1.0, group=16, balance=0.1, z=0.1)
  found = sent("stage:1,expert:4", moe=moe)
  slots = moe.experts * moe.capacity(16) * B * S // 16
  exchanged = [of_action(found, "expert", "all-to-all", scope) for scope in "FB"]
  assert [n for n, _ in exchanged] == [2 * L, 2 * L]
  assert sum(size for _, size in exchanged) == L * formulas.experts(slots, D, 4, ITEM)


@pytest.mark.sampled("schedule, chunks, sends", [("1f1b", None, 1), ("interleaved-1f1b", 2, 3)], 1)
def test_a_boundary_passes_one_activation_each_way_a_microbatch(schedule, chunks, sends):
  """In straight lines: where a loop has ticks on which nothing is sent, it sends all the same."""
  few = 2  # microbatches: all of their ticks are compiled
  found = sent("stage:2,tensor:2", schedule, chunks=chunks, unroll="all", microbatches=few)
  # Of stages 0 to 2V - 1 in turn on both devices: each sends over as many boundaries, both ways.
  want = sends * few * formulas.hop(B, S, D, ITEM)
  assert found.bytes(("stage",), "collective-permute") == (want, want)
