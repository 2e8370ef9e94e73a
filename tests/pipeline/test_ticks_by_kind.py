"""Schedules with ticks of their own run as they stand, and give the unpipelined gradients."""

import itertools
import random

import jax
import numpy as np
import pytest
from networks import lm
from networks.drawn import drawn

import jaxpipe
from jaxpipe.pipeline import timeline
from jaxpipe.pipeline.check import leaf_errors
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.ticks import ticks

F32 = dict(dtype="float32", param_dtype="float32", dropout=0.0)
NAMES = [name for name, family in FAMILIES.items() if family.by_kind]
# Slack, backward, recompute, residuals and the shape of the program are dealt in turn.
OPTIONS = itertools.cycle(
  itertools.product(
    (0, 1), (None, "split", "deferred"), (False, False, True), ("dots", "full"), ("none", "ends")
  )
)
GRID = [
  (name, P, V, M, *next(OPTIONS))
  for name in NAMES
  for P, V in itertools.product((1, 2, 3, 4), (1, 2, 3))
  if FAMILIES[name].fits(P, V)
  for M in sorted({1, P - 1, P + 1, 2 * P, 2 * P + 3} - {0})
]


@pytest.mark.sampled("name, P, V, M, slack, backward, recompute, residuals, unroll", GRID, 3)
def test_gradients_are_those_of_the_unpipelined_model(
  float64, name, P, V, M, slack, backward, recompute, residuals, unroll
):
  if FAMILIES[name].backward == "split":
    backward = None  # they place W themselves
  schedule = jaxpipe.make_schedule(
    name,
    devices=P,
    microbatches=M,
    chunks=V,
    backward=backward,
    recompute=recompute,
    ticks="kind",
  )
  if schedule.stages * M > 8:
    unroll = "none"  # straight lines of many ticks take long to compile
  stack, batch, key = lm.stack(schedule.stages), lm.batch(M), jax.random.key(7)
  params, mesh = drawn(stack), jaxpipe.make_mesh(f"stage:{P}")
  (want, _), grads = jaxpipe.reference_value_and_grad(stack, M)(params, batch, key)
  step = jaxpipe.pipeline_value_and_grad(
    stack, schedule, mesh, residuals=residuals, slack=slack, unroll=unroll, poison=True
  )
  (loss, _), got = step(jaxpipe.place(params, stack, schedule, mesh), batch, key)
  np.testing.assert_allclose(loss, want, rtol=1e-12)
  errors = leaf_errors(jaxpipe.unplace(got, stack, schedule), grads)
  assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("name", NAMES)
def test_the_program_runs_these_very_ticks(name):
  V = 2 if FAMILIES[name].any_chunks else FAMILIES[name].chunks
  schedule = jaxpipe.make_schedule(name, devices=4, microbatches=8, chunks=V, ticks="kind")
  program = lower(schedule)
  for d, (row, at) in enumerate(zip(schedule.order, ticks(schedule), strict=True)):
    assert {action: program.at[action] for action in row} == {
      action: (d, tick) for action, tick in zip(row, at, strict=True)
    }
  if schedule.ticks is not None:
    # With slack, what stood on one tick stays on one.
    rows = zip(schedule.ticks, ticks(schedule, 1), strict=True)
    moved = {(a, b) for old, new in rows for a, b in zip(old, new, strict=True)}
    assert len(moved) == len({a for a, _ in moved}) == len({b for _, b in moved})


def spread(schedule, seed):
  """The schedule with gaps of up to two ticks of its own, drawn by a seed."""
  draw, late, moved = random.Random(seed), 0, {}
  for tick in sorted({tick for row in ticks(schedule) for tick in row}):
    late += draw.randrange(3)
    moved[tick] = tick + late
  return schedule.with_ticks([[moved[tick] for tick in row] for row in ticks(schedule)])


OWN = [
  ("1f1b", "stage:2", {"head": "sharded"}),
  ("chimera", "stage:2", {}),
  ("zeropp", "stage:2,fsdp:2", {}),
  ("dualpipe-v", "stage:2", {}),
]


@pytest.mark.sampled("name, mesh, options", OWN, 1)
@pytest.mark.parametrize("slack", [0, 1])
def test_ticks_of_ones_own_are_exact(float64, name, mesh, options, slack):
  """Of kinds and placements that have none by kind: with gaps, gathers, replicas and pairs."""
  early = jaxpipe.make_schedule(name, devices=2, microbatches=4, **options)
  schedule = spread(early, name)
  assert schedule.ticks is not None
  stack, batch = lm.stack(schedule.stages if schedule.stages % 2 == 0 else 4), lm.batch(8)
  own = dict(params=drawn(stack), slack=slack, unroll="none")
  report = jaxpipe.check(stack, schedule, jaxpipe.make_mesh(mesh), batch, **own)
  assert report.ok, str(report)


def test_forwards_of_ticks_by_kind_are_early_and_predict():
  schedule = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=4, ticks="kind")
  assert ticks(schedule.forward_only()) == ((0, 1, 2, 3), (1, 2, 3, 4))
  stack, batch, mesh = lm.stack(2, **F32), lm.batch(4), jaxpipe.make_mesh("stage:2")
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  outputs = [
    jaxpipe.pipeline(None, stack, batch, mesh=mesh, schedule=one).predict(params, batch)
    for one in (schedule, jaxpipe.make_schedule("zb-h1", devices=2, microbatches=4))
  ]
  np.testing.assert_array_equal(*outputs)
  measured = timeline.measure(stack, schedule, mesh, params, batch, steps=1)
  assert sum(map(len, measured.timeline.start)) == 3 * 2 * 4
