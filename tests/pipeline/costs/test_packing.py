"""What packing costs, and what layers cost."""

import jax
import jax.numpy as jnp
import pytest
from networks import lm, unlike

import jaxpipe
from jaxpipe.pipeline.layer.slices import Saved
from jaxpipe.pipeline.storage.arenas import Arenas
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.schedules import Kind


def plan(name="1f1b", P=4, M=8):
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=M)
  return schedule, jaxpipe.make_mesh(f"stage:{P}")


def test_what_is_held_is_what_the_memory_report_counts(float64):
  schedule, mesh = plan("zb-h1")
  batch, stack = unlike.images(32), unlike.convolutions()
  packing = jaxpipe.packing_report(stack, schedule, mesh, batch)
  memory = jaxpipe.memory_report(stack, schedule, mesh, batch)
  for kind in ("parameters", "gradients", "activations", "gradient_ring", "state"):
    assert packing.held[kind] == memory.bytes[kind]
  assert all(waste >= 1 for waste in packing.waste.values())
  assert packing.ratio >= 1 and len(packing.needed["saved"]) == 4


def test_needs_are_those_of_the_leaves(float64):
  schedule, mesh = plan(P=2)
  stack = unlike.language(partition=[4, 1])
  packing = jaxpipe.packing_report(stack, schedule, mesh, unlike.text(8))
  size = lambda *paths: 8 * sum(paths)  # noqa: E731
  table, dense, adapter = 11 * 6, 6 * 6 + 6, (6 * 2 + 2) + (2 * 6 + 6)
  assert packing.needed["parameters"] == [size(table, 2 * dense, adapter), size(3)]


def test_no_gradient_of_the_loss_waits_for_the_last_stage_s_backward(float64):
  """It did, one for every microbatch under GPipe, each as wide as what travels."""
  ring = lambda M: jaxpipe.memory_report(  # noqa: E731
    unlike.convolutions(), *plan("gpipe", M=M), unlike.images(2 * M)
  ).bytes["gradient_ring"]
  assert ring(4) == ring(8) > 0


def test_a_uniform_stack_has_nothing_packed(float64):
  schedule, mesh = plan(P=2, M=2)
  with pytest.raises(ValueError, match="nothing is packed"):
    jaxpipe.packing_report(lm.stack(), schedule, mesh, lm.batch(4))


def test_records_never_overlap_while_they_are_waited_for():
  """By replay: every row of an arena holds one record from the action that makes it to its last."""
  saved = [
    [Saved((200,), jnp.float32, Kind.F, Kind.I), Saved((3, 5), jnp.float32, Kind.I, Kind.W)],
    [Saved((7,), jnp.float32, Kind.F, Kind.W)],
    [Saved((1000,), jnp.float32, Kind.F, Kind.I), Saved((4,), jnp.int32, Kind.F, Kind.W)],
    [],
  ]
  schedule = jaxpipe.make_schedule("zb-v", devices=2, microbatches=6)
  program, arenas = lower(schedule), Arenas.of(saved)
  table, used = arenas.cells(program)
  held = {}
  order = sorted(program.at.items(), key=lambda item: item[1][1])
  for action, (d, tick) in order:
    s, m = action.stage, action.microbatch
    for r, rows in arenas.rows[s].items():
      made, last, _ = arenas.records[r]
      span = [(d, arenas.pool(r), table[tick, d, r] + row) for row in range(rows)]
      if action.kind is made:
        assert not held.keys() & set(span)
        held |= dict.fromkeys(span, (s, m, r))
        assert all(row < used[d, pool] for d, pool, row in span)
      elif action.kind is last:
        assert [held.pop(place) for place in span] == [(s, m, r)] * rows
  assert not held


def test_layers_cost_what_they_compute(float64):
  stack = unlike.convolutions()
  costs = jaxpipe.layer_costs(stack, unlike.images(4), residuals="all")
  assert [cost.name for cost in costs] == [f"layers[{i}] Convolution" for i in range(5)]
  # 9 products of 4 x 4 channels at 6 x 6 pixels of 4 rows, a multiply and an add each.
  least = 2 * 9 * 4 * 4 * 36 * 4
  assert least <= costs[1].forward <= 1.6 * least
  assert costs[1].weight_grad >= 0.8 * least
  assert costs[1].output == 4 * 6 * 6 * 4 * 8
  assert costs[3].parameters == 4 * 8 * (9 * 6 * 6 + 3 * 6)


def test_a_partition_by_name_is_the_stack_s(float64):
  schedule, _ = plan(P=2, M=4)
  stack, found = jaxpipe.partitioned(unlike.language(), schedule, unlike.text(8))
  assert stack.partition == found.sizes and sum(found.sizes) == 5
  by_hand, _ = jaxpipe.partitioned(unlike.language(), schedule, unlike.text(8), "4,1")
  assert by_hand.partition == (4, 1)
  with pytest.raises(ValueError, match="unknown partition 'even'"):
    jaxpipe.partitioned(unlike.language(), schedule, unlike.text(8), "even")
  assert jax.tree.structure(stack.param_shapes()) == jax.tree.structure(by_hand.param_shapes())
