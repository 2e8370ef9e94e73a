"""The encoder-decoder through the pipeline: unlike layers, a pair that travels, a tied table."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.models.translation import TranslationConfig, translation

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-v", "chimera")
# Layers of each stage, by the number of stages; encoder and decoder layers meet within a stage.
UNEVEN = {2: (1, 3), 4: (1, 2, 0, 1), 8: (1, 0, 1, 0, 1, 0, 0, 1)}
GRID = list(itertools.product(SCHEDULES, (2, 4), (False, True)))


def stack(partition=None):
  shape = dict(vocabulary_size=11, layers=2, width=8, hidden=12, heads=2, dropout=0.2)
  config = TranslationConfig(**shape, dtype=jnp.float64, param_dtype=jnp.float64)
  return translation(config, partition)


def batch(rows):
  """Sources and targets of unlike lengths, so that microbatches weigh unlike."""
  rng = np.random.default_rng(0)
  source, tokens, targets = (rng.integers(1, 11, (rows, n), np.int32) for n in (5, 4, 4))
  weights = (np.arange(4) < rng.integers(1, 5, (rows, 1))).astype(np.float64)
  source[np.arange(5) >= rng.integers(2, 6, (rows, 1))] = 0
  return {"source": source, "tokens": tokens, "targets": targets, "weights": weights}


@pytest.mark.sampled("name, P, uneven", GRID, 1)
def test_gradients_are_those_of_the_unpipelined_model(float64, name, P, uneven):
  M = 2 * P if name == "chimera" else P + 1
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=M)
  stages = schedule.stages
  report = jaxpipe.check(
    stack(UNEVEN[stages] if uneven else None),
    schedule,
    jaxpipe.make_mesh(f"stage:{P}"),
    batch(2 * M),
  )
  assert report.ok and len(report.errors) > 20, report
