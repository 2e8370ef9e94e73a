"""What the executor refuses, and that NaN in whatever no action has written reaches no result."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import lm

import jaxpipe
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.program import CODE, Program
from jaxpipe.schedules import Kind

F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32, attention=jax.nn.dot_product_attention)


def build(layers=4, devices=2, microbatches=2, mesh=None, **changes):
  stack = lm.stack(layers, **F32, **changes)
  schedule = jaxpipe.make_schedule("1f1b", devices=devices, microbatches=microbatches)
  mesh = jaxpipe.make_mesh(mesh or f"stage:{devices}")
  return stack, schedule, mesh


def test_layers_that_do_not_fill_the_stages():
  stack, schedule, mesh = build(layers=6, devices=4)
  with pytest.raises(ValueError, match=r"6 layers cannot fill 4 stages evenly; use 3 stages"):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)


def test_a_mesh_of_another_size_than_the_schedules():
  stack, schedule, mesh = build(devices=4, mesh="stage:2")
  with pytest.raises(ValueError, match=r"1f1b is for 4 devices but the mesh has 2 along"):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)


def test_rows_that_do_not_divide():
  stack, schedule, mesh = build(mesh="stage:2,data:2")
  params = stack.init(jax.random.key(0), lm.batch(4), schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)
  with pytest.raises(ValueError, match=r"6 rows cannot be cut into 2 microbatches over 2 data"):
    step(params, lm.batch(6), jax.random.key(0))


def test_parameters_that_were_never_placed():
  """Their shapes are right, so that nothing but their place can tell."""
  stack, schedule, mesh = build()
  params = stack.init(jax.random.key(0), lm.batch(4))
  with pytest.raises(ValueError, match=r"is not on its stage; call jaxpipe.place"):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)(params, lm.batch(4))


def test_dropout_without_a_key():
  stack, schedule, mesh = build()
  params = stack.init(jax.random.key(0), lm.batch(4), schedule, mesh)
  with pytest.raises(ValueError, match=r"uses dropout; call the step with a key"):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)(params, lm.batch(4))


def test_an_unknown_residual_policy():
  stack, schedule, mesh = build()
  with pytest.raises(
    ValueError, match=r"residuals 'some' is unknown; use one of auto, all, dots, full,"
  ):
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, residuals="some")


def test_one_compilation_serves_every_step(monkeypatch):
  """Gradients go back in as parameters: a step's outputs must be laid out like its inputs."""
  from jaxpipe.pipeline import execution

  stack, schedule, mesh = build()
  traces, cut = [], execution.microbatches
  monkeypatch.setattr(execution, "microbatches", lambda *args: traces.append(1) or cut(*args))
  params = stack.init(jax.random.key(0), lm.batch(4), schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none")
  for seed in range(3):
    _, params = step(params, lm.batch(4, seed=seed), jax.random.key(seed))
  assert len(traces) == 1


def test_an_illegal_schedule_that_nobody_checked():
  """Without one W it would run to the end, and its gradients would lack a microbatch."""
  stack, _, mesh = build()
  split = jaxpipe.make_schedule("1f1b", devices=2, microbatches=4, backward="split")
  order = tuple(tuple(a for a in row if str(a) != "1W2") for row in split.order)
  lacking = jaxpipe.Schedule("mine", split.placement, 4, order)
  with pytest.raises(jaxpipe.ScheduleError, match="1W2 is missing on device 1"):
    jaxpipe.pipeline_value_and_grad(stack, lacking, mesh)


def test_batch_leaves_with_different_rows_are_named():
  stack, schedule, mesh = build(dropout=0.0)
  params = stack.init(jax.random.key(0), lm.batch(4), schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)
  with pytest.raises(ValueError, match=r"batch\['extra'\] has 3"):
    step(params, {**lm.batch(4), "extra": np.zeros(3)})


@pytest.mark.parametrize("column", ["activations", "gradients", "cells"])
def test_poison_shows_a_slot_that_is_read_before_it_is_filled(monkeypatch, column):
  stack, schedule, mesh = build(dropout=0.0)

  class Wrong(Program):
    """Has one more slot, or cell, than anybody fills, and reads that."""

    def length(self, ring):
      return super().length(ring) + (ring == column)

    def cells(self, values):
      table, lengths = super().cells(values)
      if column == "cells":
        reads = (self.table["kind"] == CODE[Kind.B])[..., None]
        lengths = tuple(n + 1 for n in lengths)
        last = np.array([lengths[value.pool] - 1 for value in values])
        table = np.where(reads, last, table)
      return table, lengths

  def wrong(schedule, **options):
    program = lower(schedule, **options)
    table = dict(program.table)
    if column != "cells":
      reads = program.table["kind"] == CODE[Kind.F if column == "activations" else Kind.B]
      table[column] = np.where(reads, program.slots[column] + 1, table[column])
    return Wrong(**{**vars(program), "table": table})

  monkeypatch.setattr("jaxpipe.pipeline.execution.lower", wrong)
  report = jaxpipe.check(stack, schedule, mesh, lm.batch(4), unroll="none")
  assert report.worst == float("inf")


class Pair(nnx.Module):
  """A layer whose x is a tree with an integer leaf, which it uses and passes on."""

  def __init__(self, rngs):
    self.scale = nnx.Param(jax.random.normal(rngs.params(), (3,)))

  def __call__(self, x, context):
    turned = jnp.take_along_axis(x["signal"], x["order"], axis=1)
    return {"signal": x["signal"] + turned * self.scale[...][None, :], "order": x["order"]}


class PairEmbed(nnx.Module):
  def __init__(self, rngs):
    self.bias = nnx.Param(jax.random.normal(rngs.params(), (3,)))

  def __call__(self, batch):
    return {"signal": batch["signal"] + self.bias[...][None, :], "order": batch["order"]}


class PairHead(nnx.Module):
  def __init__(self, rngs):
    self.weight = nnx.Param(jax.random.normal(rngs.params(), (3,)))

  def __call__(self, x, batch):
    return jnp.sum(jnp.sin(x["signal"]) @ self.weight[...]), 1.0 * len(batch["signal"]), {}


@pytest.mark.sampled(
  "backward, residuals", list(itertools.product(("fused", "split"), ("full", "dots", "all"))), 2
)
def test_integer_leaves_travel_between_stages(backward, residuals):
  stack = jaxpipe.LayerStack(embed=PairEmbed, layers=[Pair] * 4, head=PairHead)
  rng = np.random.default_rng(0)
  order = np.stack([rng.permutation(3) for _ in range(6)]).astype(np.int32)
  batch = {"signal": rng.normal(size=(6, 3)).astype(np.float32), "order": order}
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=3, backward=backward)
  report = jaxpipe.check(
    stack, schedule, jaxpipe.make_mesh("stage:2"), batch, residuals=residuals, unroll="none"
  )
  assert report.ok, str(report)


class Loop(nnx.Module):
  """A layer with a scan of its own, from a constant or from the data."""

  def __init__(self, rngs, start):
    self.inner = nnx.Linear(3, 3, rngs=rngs)
    self.start = start

  def __call__(self, x, context):
    start = self.start(x["signal"])
    total, _ = jax.lax.scan(lambda sum, _: (sum + self.inner(x["signal"]), None), start, length=2)
    return {**x, "signal": jnp.tanh(total)}


def loop_stack(start):
  layer = lambda rngs: Loop(rngs, start)  # noqa: E731
  return jaxpipe.LayerStack(embed=PairEmbed, layers=[layer] * 2, head=PairHead)


PAIRS = {"signal": np.ones((4, 3), np.float32), "order": np.zeros((4, 3), np.int32)}


def test_a_loop_inside_a_layer():
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2, backward="split")
  report = jaxpipe.check(
    loop_stack(jnp.zeros_like), schedule, jaxpipe.make_mesh("stage:2"), PAIRS, unroll="none"
  )
  assert report.ok, str(report)


class Constants(nnx.Module):
  """Adds a leaf to x that depends on nothing, as auxiliary losses begin."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(3, 3, rngs=rngs)

  def __call__(self, batch):
    return {"h": self.inner(batch["signal"]), "aux": jnp.zeros(len(batch["signal"]))}


class Reset(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(3, 3, rngs=rngs)

  def __call__(self, x, context):
    return {"h": jnp.sin(self.inner(x["h"])), "aux": jnp.zeros_like(x["aux"])}


class Flags(nnx.Module):
  """A head with boolean, narrow and no-gradient metrics."""

  def __init__(self, rngs):
    self.weight = nnx.Param(jnp.ones(3))

  def __call__(self, x, batch):
    loss = jnp.sum(x["h"] @ self.weight[...]) + jnp.sum(x["aux"])
    metrics = {"flag": jnp.any(x["h"] > 0), "count": jnp.int8(100), "none": {}}
    return loss, 1.0 * len(x["h"]), metrics


@pytest.mark.sampled("backward", ["fused", "split"], 1)
def test_constant_leaves_and_narrow_metrics(backward):
  stack = jaxpipe.LayerStack(embed=Constants, layers=[Reset] * 2, head=Flags)
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=4, backward=backward)
  mesh = jaxpipe.make_mesh("stage:2")
  report = jaxpipe.check(stack, schedule, mesh, PAIRS, unroll="none")
  assert report.ok, str(report)
  params = stack.init(jax.random.key(0), PAIRS, schedule, mesh)
  # The program that the check compiled.
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none", poison=True)
  (_, metrics), _ = step(params, PAIRS, jax.random.key(0))
  assert int(metrics["count"]) == 400 and 0 <= int(metrics["flag"]) <= 4
