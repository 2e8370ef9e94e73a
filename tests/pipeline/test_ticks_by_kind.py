"""Schedules with ticks of their own run as they stand, and give the unpipelined gradients."""

import itertools

import jax
import numpy as np
import pytest
from networks import lm
from networks.drawn import drawn

import jaxpipe
from jaxpipe.pipeline.check import leaf_errors
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.ticks import ticks

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
  for d, (row, at) in enumerate(zip(schedule.order, schedule.ticks, strict=True)):
    assert {action: program.at[action] for action in row} == {
      action: (d, tick) for action, tick in zip(row, at, strict=True)
    }
  # With slack, what stood on one tick stays on one.
  moved = ticks(schedule, 1)
  pairs = {
    (a, b)
    for old, new in zip(schedule.ticks, moved, strict=True)
    for a, b in zip(old, new, strict=True)
  }
  assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
