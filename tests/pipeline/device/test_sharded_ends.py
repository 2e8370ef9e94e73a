"""The vocabulary cut over the stages: the same gradients, equal shares, refusals when built."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import lm
from networks.drawn import drawn

import jaxpipe
from jaxpipe.models.transformer.decoder import Embed, Head, Layer, TransformerConfig
from jaxpipe.pipeline.check import leaf_errors
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.schedules import Kind
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.stack.module_spec import StackError
from jaxpipe.stack.stack import LayerStack
from jaxpipe.stack.vocabulary import Tables

NAMES = (
  *("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-min", "hanayo", "chimera"),
  *("bitpipe", "dualpipe", "dualpipe-v", "looped-bfs"),
)
# Data axis, slack, program shape and policy are dealt in turn to the cases of the grid.
OPTIONS = itertools.cycle(
  itertools.product(
    (1, 2), (0, 1), ("none", "ends", "none", "all", "none"), ("full", "dots", "all")
  )
)
GRID = [
  (name, P, M, tied, *next(OPTIONS))
  for name, P in itertools.product(NAMES, (1, 2, 4))
  if FAMILIES[name].fits(P, FAMILIES[name].chunks)
  for M in sorted({1, P, P + 1, 3 * P + 1})
  for tied in (True, False)
]


def sharded(name, P, M):
  return jaxpipe.make_schedule(name, devices=P, microbatches=M, head="sharded")


@pytest.mark.sampled("name, P, M, tied, data, slack, unroll, residuals", GRID, 3)
def test_gradients_are_those_of_the_whole_head(
  float64, name, P, M, tied, data, slack, unroll, residuals
):
  schedule = sharded(name, P, M)
  if schedule.stages * M > 8:
    unroll = "none"  # straight lines of many ticks take long to compile
  stack, batch = lm.stack(schedule.stages, tied=tied), lm.batch(M * data)
  mesh, key = jaxpipe.make_mesh(f"stage:{P},data:{data}"), jax.random.key(7)
  params = drawn(stack)
  step = jaxpipe.pipeline_value_and_grad(
    stack, schedule, mesh, residuals=residuals, slack=slack, unroll=unroll, poison=True
  )
  (loss, metrics), got = step(jaxpipe.place(params, stack, schedule, mesh), batch, key)
  run = jaxpipe.reference_value_and_grad(stack, M)
  (want, want_metrics), grads = run(params, batch, key)
  np.testing.assert_allclose(loss, want, rtol=1e-12)
  assert metrics == want_metrics
  errors = leaf_errors(jaxpipe.unplace(got, stack, schedule), grads)
  assert max(errors.values()) <= 1e-12, errors


@pytest.mark.smoke
@pytest.mark.sampled("tied", [True, False], 1)
def test_zero_bubble_with_a_sharded_vocabulary(float64, tied):
  schedule = sharded("zb-h1", 2, 3)
  stack = lm.stack(2, tied=tied)
  report = jaxpipe.check(
    stack,
    schedule,
    jaxpipe.make_mesh("stage:2,data:2"),
    lm.batch(6),
    params=drawn(stack),
    unroll="none",
  )
  assert report.ok, str(report)


def test_recompute_beside_the_vocabulary_passes(float64):
  sizes = dict(devices=2, microbatches=4)
  schedule = jaxpipe.make_schedule("1f1b", **sizes, recompute=True, head="sharded")
  assert {a.kind for row in schedule.order for a in row} == set(map(Kind, "FRBST"))
  stack, mesh = lm.stack(2), jaxpipe.make_mesh("stage:2")
  report = jaxpipe.check(stack, schedule, mesh, lm.batch(4), params=drawn(stack), unroll="none")
  assert report.ok, str(report)


def test_evaluation_with_a_sharded_vocabulary(float64):
  schedule, mesh = sharded("1f1b", 2, 3), jaxpipe.make_mesh("stage:2,data:2")
  stack, batch = lm.stack(2, dropout=0.0), lm.batch(6)
  params = drawn(stack)
  (loss, metrics), _ = jaxpipe.reference_value_and_grad(stack, microbatches=3)(params, batch)
  evaluate = jaxpipe.pipeline_forward(stack, schedule, mesh, poison=True)
  got, got_metrics = evaluate(jaxpipe.place(params, stack, schedule, mesh), batch)
  np.testing.assert_allclose(got, loss, rtol=1e-12)
  assert got_metrics == metrics


@pytest.mark.sampled("P, tied", list(itertools.product((2, 4), (True, False))), 2)
def test_every_device_stores_equally_much_and_the_tables_once(P, tied):
  stack, schedule = lm.stack(tied=tied, dtype="float32", param_dtype="float32"), None
  schedule, mesh = sharded("1f1b", P, 4), jaxpipe.make_mesh(f"stage:{P}")
  params = stack.init(jax.random.key(0), lm.batch(4), schedule, mesh)
  held = {device: 0 for device in mesh.devices.flat}
  for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  assert len(set(held.values())) == 1
  shard = params["embed"]["table"].addressable_shards[0].data
  assert shard.shape == (lm.VOCABULARY // P, 8)
  assert ("table" in params["head"]) is not tied


def test_large_logits_do_not_overflow_bfloat16_arithmetic():
  """Max and sum are float32: exp(90) is not a bfloat16 problem, but a sum of many is."""
  stack = lm.stack(
    2, dtype="bfloat16", param_dtype="float32", attention=jax.nn.dot_product_attention, dropout=0.0
  )
  schedule, mesh, batch = sharded("1f1b", 2, 2), jaxpipe.make_mesh("stage:2"), lm.batch(4)
  params = drawn(stack)
  table = params["embed"]["table"] * 2000
  params = {**params, "embed": {**params["embed"], "table": table}}
  placed = jaxpipe.place(params, stack, schedule, mesh)
  (loss, _), grads = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none")(
    placed, batch
  )
  (want, _), _ = jaxpipe.reference_value_and_grad(stack, 2)(params, batch)
  assert want > 30  # the target is far from the largest logit
  np.testing.assert_allclose(loss, want, rtol=2e-2)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_no_device_has_the_head_alone():
  """The program of a last stage does what the others' do: S and T for every microbatch."""
  program = lower(sharded("1f1b", 4, 8))
  for kind in (Kind.S, Kind.T):
    devices = [d for action, (d, _) in program.at.items() if action.kind is kind]
    assert [devices.count(d) for d in range(4)] == [8] * 4


def test_y_reaches_its_slot_only_after_t_has_read_the_last_one():
  """A slot that T reads is not filled again before the tick on which T runs."""
  for name, M in itertools.product(("1f1b", "zb-h1", "gpipe"), (4, 9)):
    program = lower(sharded(name, 4, M))
    life = {}
    for action, (d, tick) in program.at.items():
      if action.kind in (Kind.S, Kind.T):
        slot = int(program.table["vocabulary"][tick, d])
        life.setdefault((d, slot), {}).setdefault(action.microbatch, []).append(tick)
    for held in life.values():
      spans = sorted((min(ticks), max(ticks)) for ticks in held.values())
      for (_, end), (start, _) in itertools.pairwise(spans):
        assert end < start


def refusal(stack, schedule, P=2):
  mesh, batch = jaxpipe.make_mesh(f"stage:{P}"), lm.batch(4)
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  jax.eval_shape(jaxpipe.pipeline_value_and_grad(stack, schedule, mesh), params, batch)


def test_a_vocabulary_that_the_devices_do_not_divide():
  message = r"15 tokens cannot be cut over 2 devices; use 16 .*, or 14"
  with pytest.raises(StackError, match=message):
    refusal(
      lm.stack(vocabulary_size=15, dtype="float32", param_dtype="float32"), sharded("1f1b", 2, 2)
    )


CONFIG = TransformerConfig(vocabulary_size=16, layers=2, width=8, heads=2, kv_heads=2)


def plain(head=Head, vocabulary=Tables(embed="table", head="table")):  # noqa: B008 - frozen
  layer = lambda rngs: Layer(CONFIG, rngs)  # noqa: E731
  return LayerStack(
    embed=lambda rngs: Embed(CONFIG, rngs),
    layers=[layer] * 2,
    head=lambda rngs: head(CONFIG, rngs),
    vocabulary=vocabulary,
  )


def test_a_stack_that_does_not_say_where_its_tables_are():
  with pytest.raises(StackError, match="does not say where its tables are"):
    refusal(plain(vocabulary=None), sharded("1f1b", 2, 2))


class Mute(nnx.Module):
  """A head that only knows how to be whole."""

  def __init__(self, config, rngs):
    self.table = nnx.Param(jnp.zeros((config.vocabulary_size, config.width)))

  def __call__(self, x, batch):
    return jnp.sum(x @ self.table[...].T), jnp.float32(1), {"correct": jnp.float32(0)}


def test_a_head_without_the_parts():
  with pytest.raises(StackError, match="head has no method"):
    refusal(plain(Mute), sharded("1f1b", 2, 2))


class Talkative(Head):
  def __call__(self, x, batch):
    loss, weight, metrics = super().__call__(x, batch)
    return loss, weight, {**metrics, "entropy": loss}


def test_metrics_that_shards_cannot_give():
  """They would vanish from the log in silence."""
  with pytest.raises(StackError, match=r"metrics correct, entropy.*only correct"):
    refusal(plain(Talkative), sharded("1f1b", 2, 2))


def test_another_place_for_the_head():
  with pytest.raises(ValueError, match=r"head='first'; use head='last' or head='sharded'"):
    jaxpipe.make_schedule("1f1b", devices=2, microbatches=2, head="first")


@pytest.mark.parametrize("embed, head", [("none", "table"), ("table", "norm/scale")])
def test_paths_that_lead_to_no_table(embed, head):
  with pytest.raises(StackError, match=r"both must be tables \[V, D\]"):
    plain(vocabulary=Tables(embed=embed, head=head))
