"""What AdamW is told: rates, decay, dtypes; and where its moments are born."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpipe.models.transformer.decoder import TransformerConfig, transformer
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.plan.optimizer import decay_mask, learning_rate, make_optimizer, widen
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
