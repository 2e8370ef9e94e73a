"""CompleteP's table, and that a model learns alike at every depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import lm

from jaxpipe.models.transformer.completep import CompleteP, Factors
from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.sample import forward
from jaxpipe.training.plan.optimizer import make_optimizer

RULES = CompleteP(width=2, depth=4)


@pytest.mark.parametrize(
  "path, rank, factors",
  [
    ("embed/table", 2, Factors(rate=1, decay=1, epsilon=1 / 2)),
    ("embed/positions", 2, Factors(rate=1, decay=1, epsilon=1 / 2)),
    ("head/table", 2, Factors(rate=1, decay=1, epsilon=1 / 2)),
    ("head/norm/scale", 1, Factors(rate=1, decay=0, epsilon=1 / 2)),
    ("layers/query/kernel", 2, Factors(rate=1 / 2, decay=2, epsilon=1 / 8)),
    ("layers/query/bias", 1, Factors(rate=1, decay=0, epsilon=1 / 8)),
    ("layers/mlp_norm/scale", 1, Factors(rate=1, decay=0, epsilon=1 / 8)),
  ],
)
def test_the_table(path, rank, factors):
  assert RULES.factors(path, rank) == factors


def test_what_the_model_multiplies():
  assert (RULES.branch, RULES.logits, RULES.deviation**2) == (1 / 4, 1 / 2, pytest.approx(1 / 2))


def test_the_base_is_itself():
  """At the base's own shape the model and its fresh parameters are those without rules."""
  plain = TransformerConfig(vocabulary_size=16, layers=2, width=8, heads=2, kv_heads=1, **lm.QWEN2)
  based = dataclasses.replace(plain, completep=CompleteP.parse("8x2", 8, 2))
  results = []
  for config in (plain, based):
    stack = transformer(config)
    params = stack.init(jax.random.key(0), lm.batch(2))
    results.append((params, forward(stack, params, lm.batch(1)["tokens"][0])))
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_fresh_matrices_of_a_wider_model():
  config = TransformerConfig(vocabulary_size=16, layers=8, width=64, heads=2, kv_heads=2)
  wide = dataclasses.replace(config, completep=CompleteP.parse("16x2", 64, 8))
  params = transformer(wide).init(jax.random.key(0), lm.batch(2))

  def deviation(name):
    return float(jnp.std(params["layers"][name]["kernel"]))

  assert deviation("query") == pytest.approx(0.02 / 2, rel=0.05)
  assert deviation("down") == pytest.approx(0.02 / 2 / (2 * 2) ** 0.5, rel=0.05)
  assert float(jnp.std(params["embed"]["table"])) == pytest.approx(0.02, rel=0.1)


def test_one_update_by_hand():
  """Rate, decay and epsilon of a matrix in a layer; the gradient is as small as epsilon."""
  config = Config(
    **dict(width=128, layers=4, completep_base="64x1", learning_rate=0.5, warmup_steps=0),
    **dict(steps=10, weight_decay=0.2, clip_norm=0.0),
  )
  params = {"embed": {}, "layers": {"query": {"kernel": jnp.full((4, 1, 1), 3.0)}}, "head": {}}
  grads = jax.tree.map(lambda p: 1e-8 * jnp.ones_like(p), params)
  optimizer = make_optimizer(config)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  adam = 1e-8 / (1e-8 + 1e-8 / 8)
  want = -0.5 / 2 * (adam + 2 * 0.2 * 3)
  np.testing.assert_allclose(updates["layers"]["query"]["kernel"], want, rtol=1e-5)


@pytest.mark.parametrize("base", ["256", "0x4", "axb"])
def test_a_base_that_is_none(base):
  with pytest.raises(ValueError, match=r"is not WIDTHxLAYERS of a base model; use one like 256x4"):
    Config(completep_base=base)


def moved(layers, base):
  """Root mean square of how far the last layer's output moves in five updates."""
  config = Config(
    **dict(layers=layers, width=16, heads=2, kv_heads=2, mlp_width=32, completep_base=base),
    **dict(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0),
  )
  stack = transformer(config.model(lm.VOCABULARY))
  batch, optimizer = lm.batch(8), make_optimizer(config)
  params = stack.init(jax.random.key(0), batch)

  @jax.jit
  def hidden(params):
    def layer(x, at):
      inputs = dict(batch=batch, key=None, layer=at[1], microbatch=0, rows=jnp.arange(8))
      return stack.apply_layer(at[0], x, False, inputs), None

    x = stack.apply_embed(params["embed"], batch)
    return jax.lax.scan(layer, x, (params["layers"], jnp.arange(stack.depth)))[0]

  def loss(params):
    loss_sum, (weight, _) = stack.apply_head(stack.head_params(params), hidden(params), batch)
    return loss_sum / weight

  @jax.jit
  def update(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  before, state = hidden(params), optimizer.init(params)
  for _ in range(5):
    params, state = update(params, state)
  return float(jnp.sqrt(jnp.mean((hidden(params) - before) ** 2)))


def test_activations_move_alike_at_every_depth():
  shallow, deep, plain = moved(2, "16x2"), moved(8, "16x2"), moved(8, "")
  assert 1 / 1.2 < deep / shallow < 1.2  # seen: 0.93, and 0.93 again at 16 layers
  assert plain > 1.5 * shallow  # without the rules, 1.9 times, and 3.5 at 16 layers
