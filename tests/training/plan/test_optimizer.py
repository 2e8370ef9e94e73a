"""What AdamW is told: rates, decay, dtypes; and where its moments are born."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.models.transformer.decoder import TransformerConfig, transformer
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.plan.optimizer import (
  decay_mask,
  decayed,
  learning_rate,
  make_optimizer,
  placed_mask,
  widen,
)
from jaxpipe.training.plan.state import create_state


def test_decay_reaches_matrices_and_tables_only() -> None:
  stack = transformer(
    TransformerConfig(vocabulary_size=8, layers=2, width=8, heads=2, kv_heads=1, mlp_width=16)
  )
  mask = decay_mask(stack.param_shapes())
  flat = {jax.tree_util.keystr(k, simple=True): v for k, v in jax.tree.leaves_with_path(mask)}
  for name, decays in flat.items():
    assert decays == ("norm" not in name), name
  assert sum(flat.values()) == 7 + 2 and len(flat) == 9 + 3


def test_rate_warms_up_and_falls_to_a_tenth() -> None:
  config = Config(learning_rate=1.0, warmup_steps=10, steps=110)
  rates = np.array([learning_rate(config)(k) for k in range(111)])
  np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
  assert (np.diff(rates[10:]) < 0).all()
  np.testing.assert_allclose([rates[60], rates[110]], [0.55, 0.1], rtol=1e-5)


def test_moments_are_float32_for_bfloat16_parameters() -> None:
  params = {"embed": {"table": jnp.ones((2, 2), jnp.bfloat16)}, "layers": {}, "head": {}}
  state = make_optimizer(Config()).init(widen(params))
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert len(moments) == 2 and all(leaf.dtype == jnp.float32 for leaf in moments)


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 1.0), (0.0, 1.0), (1.0, 1e4)])
def test_one_update_by_hand(clip: float, scale: float) -> None:
  config = Config(learning_rate=0.5, warmup_steps=0, steps=10, weight_decay=0.2, clip_norm=clip)
  params = {"embed": {"table": jnp.full((2, 2), 3.0)}, "layers": {}, "head": {"b": jnp.ones(2)}}
  grads = jax.tree.map(lambda p: scale * jnp.ones_like(p), params)
  optimizer = make_optimizer(config)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  new = optax.apply_updates(params, updates)
  # Adam's first step has size 1 whatever the gradient, so clipping cannot show; decay adds 0.2 p.
  np.testing.assert_allclose(new["embed"]["table"], 3 - 0.5 * (1 + 0.2 * 3), rtol=1e-5)
  np.testing.assert_allclose(new["head"]["b"], 1 - 0.5, rtol=1e-5)


def test_clipping_scales_by_the_global_norm() -> None:
  grads = {"embed": {"table": jnp.full((2, 2), 3.0)}, "layers": {}, "head": {"b": jnp.zeros(2)}}
  optimizer = make_optimizer(Config(clip_norm=1.5))
  _, state = optimizer.update(grads, optimizer.init(grads), grads)
  # The norm is 6, so the gradient shrinks to a quarter; the moment takes 1 - b1 of it.
  np.testing.assert_allclose(state[1].mu["embed"]["table"], 0.1 * 0.75, rtol=1e-6)


def test_moments_are_born_on_their_stages(tiny: Callable[..., Config]) -> None:
  setup = build_run(tiny())
  state = create_state(
    setup.stack, setup.optimizer, 0, setup.batch_shapes, setup.schedule, setup.mesh
  )
  adam = state.opt_state[1]
  for tree in (state.params, adam.mu, adam.nu):
    for leaf in jax.tree.leaves(tree["layers"]):
      assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [1] * 4
    for leaf in jax.tree.leaves([tree["embed"], tree["head"]]):
      assert leaf.sharding.is_fully_replicated


class Unlike(nnx.Module):
  """A matrix between vectors, so that what decays lies in several stretches of a row."""

  def __init__(self, rngs, width):
    self.a = nnx.Linear(4, width, rngs=rngs)
    self.wide = nnx.Param(jnp.ones(9 * width))
    self.b = nnx.Linear(width, 4, rngs=rngs)

  def __call__(self, x, context):
    return x + self.b(self.a(x)) * self.wide.sum()


class First(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Last(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(4, 1, rngs=rngs)

  def __call__(self, x, batch):
    return jnp.sum(self.inner(x)), 1.0, {}


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_decay_of_packed_rows_finds_the_matrices_and_holds_no_mask(schedule: str) -> None:
  layers = [functools.partial(Unlike, width=width) for width in (300, 8, 40, 16)]
  stack = jaxpipe.LayerStack(embed=First, layers=layers, head=Last)
  made = jaxpipe.make_schedule(schedule, devices=2, microbatches=4)
  mesh = jaxpipe.make_mesh("stage:2")
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), stack.param_shapes())
  params = jaxpipe.place(ones, stack, made, mesh)
  tx = decayed(0.5, placed_mask(stack, made))

  def update(params: Any) -> Any:
    return tx.update(jax.tree.map(jnp.zeros_like, params), optax.EmptyState(), params)[0]

  places = jax.tree.map(lambda leaf: leaf.sharding, params)
  compiled = jax.jit(update, out_shardings=places).lower(params).compile()
  memory = compiled.memory_analysis()
  assert memory is not None and memory.temp_size_in_bytes < memory.argument_size_in_bytes / 10
  got = jaxpipe.unplace(compiled(params), stack, made)
  for i, run in enumerate(got["layers"]):
    for path, leaf in jax.tree.leaves_with_path(run):
      decays = leaf[0].ndim > 1
      assert (leaf == 0.5 * decays).all(), (i, path)
  assert (got["embed"]["inner"]["kernel"] == 0.5).all()
  assert (got["head"]["inner"]["bias"] == 0).all()
