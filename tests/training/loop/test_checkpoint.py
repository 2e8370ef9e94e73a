"""Checkpoints are canonical: what was saved under one placement is read under another."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxpipe import LayerStack, Schedule, make_mesh, make_schedule
from jaxpipe.models.transformer.decoder import TransformerConfig, transformer
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.lm.config import Config
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.plan.optimizer import make_optimizer
from jaxpipe.training.plan.state import (
  TrainState,
  canonical_shapes,
  create_state,
  state_shapes,
  to_canonical,
)

SHAPES = {name: jax.ShapeDtypeStruct((2, 8), jnp.int32) for name in ("tokens", "targets")}
SHAPES["weights"] = jax.ShapeDtypeStruct((2, 8), jnp.float32)

# Two chunks on each of two devices: device 0 holds stages 0 and 2 (loop), or 0 and 3 (v).
FORWARD = [f"{s}F0" for s in range(4)]
BACKWARD = [f"{s}B0" for s in range(4)]


def two_chunks(placement: str) -> Schedule:
  held = [(0, 2), (1, 3)] if placement == "loop" else [(0, 3), (1, 2)]
  tokens = [[FORWARD[a], FORWARD[b], BACKWARD[b], BACKWARD[a]] for a, b in held]
  return Schedule.from_tokens(tokens, placement)


def one_chunk(devices: int) -> Schedule:
  return make_schedule("gpipe", devices=devices, microbatches=1)


@pytest.fixture(scope="module")
def stack() -> LayerStack:
  return transformer(
    TransformerConfig(vocabulary_size=8, layers=4, width=8, heads=2, kv_heads=1, mlp_width=16)
  )


def labelled(stack: LayerStack, schedule: Schedule) -> TrainState:
  """A state whose moments differ from each other and from layer to layer, as the parameters do."""
  mesh = make_mesh({"stage": schedule.devices})
  state = create_state(stack, make_optimizer(Config()), 3, SHAPES, schedule, mesh)
  clip, adam, *rest = state.opt_state
  double = jax.tree.map(lambda p: 2 * p, state.params)
  triple = jax.tree.map(lambda p: 3 * p, state.params)
  adam = adam._replace(mu=double, nu=triple)
  return dataclasses.replace(state, opt_state=(clip, adam, *rest), step=jnp.int32(7))


def shapes_of(stack: LayerStack, schedule: Schedule, mesh: Mesh) -> TrainState:
  shapes = state_shapes(stack, make_optimizer(Config()), schedule)
  return canonical_shapes(shapes, stack, schedule, mesh)


def assert_equal(a: TrainState, b: TrainState) -> None:
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.sampled(
  "saved, restored",
  [
    pytest.param(two_chunks("loop"), one_chunk(4), id="loop-to-4"),
    pytest.param(one_chunk(4), two_chunks("loop"), id="4-to-loop"),
    pytest.param(two_chunks("v"), one_chunk(1), id="v-to-1"),
    pytest.param(two_chunks("v"), two_chunks("loop"), id="v-to-loop"),
  ],
  2,
)
def test_any_placement_reads_what_any_other_wrote(
  tmp_path: Path, stack: LayerStack, saved: Schedule, restored: Schedule
) -> None:
  state = labelled(stack, saved)
  key = jax.random.fold_in(jax.random.key(3), 2**31)
  old, mesh = make_mesh({"stage": saved.devices}), make_mesh({"stage": restored.devices})
  canonical = to_canonical(state, stack, saved, old)
  jax.tree.map(np.testing.assert_array_equal, canonical.params, stack.init(key, SHAPES))
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(state, stack, saved, old, {"seed": 3})
  checkpoints.wait()
  assert checkpoints.newest == 7 and checkpoints.meta(7) == {"seed": 3, "step": 7}
  shapes = shapes_of(stack, restored, mesh)
  got = checkpoints.restore(7, shapes, stack, restored, mesh)
  checkpoints.close()
  assert_equal(to_canonical(got, stack, restored, mesh), canonical)
  assert_equal(got, labelled(stack, restored))
  share = {
    leaf.addressable_shards[0].data.shape[0] for leaf in jax.tree.leaves(got.params["layers"])
  }
  assert share == {4 // restored.devices}


def test_only_the_last_few_are_kept(tmp_path: Path, stack: LayerStack) -> None:
  state, mesh = labelled(stack, one_chunk(1)), make_mesh("stage:1")
  checkpoints = Checkpoints(tmp_path)
  for step in range(1, 6):
    checkpoints.save(
      dataclasses.replace(state, step=jnp.int32(step)), stack, one_chunk(1), mesh, {"seed": 0}
    )
  checkpoints.close()
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 4, 5]


def test_a_damaged_checkpoint_says_what_to_delete(tmp_path: Path, stack: LayerStack) -> None:
  schedule, mesh = one_chunk(1), make_mesh("stage:1")
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(labelled(stack, schedule), stack, schedule, mesh, {"seed": 0})
  checkpoints.wait()
  (step,) = (int(path.name) for path in tmp_path.iterdir())
  shutil.rmtree(tmp_path / str(step) / "optimizer")
  shapes = shapes_of(stack, schedule, mesh)
  with pytest.raises(ConfigError, match=rf"{step}: cannot be read .* delete that folder to resume"):
    checkpoints.restore(step, shapes, stack, schedule, mesh)
  checkpoints.close()
