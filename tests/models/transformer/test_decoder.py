"""The shipped transformer: shapes, positions, causality, and what its configuration refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import lm
from networks.drawn import drawn

from jaxpipe.models.transformer.config import TransformerConfig, flops_per_token
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.models.transformer.rotary import RopeScaling, rotate
from jaxpipe.stack.forward import head_module

SHAPE = dict(vocabulary_size=16, layers=2, width=8, heads=2, kv_heads=1)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(width=9), r"width 9 over 2 heads .* use a multiple of 4"),
    (dict(heads=4, kv_heads=3), r"3 kv_heads do not divide 4 heads"),
    (dict(mlp="relu"), r"mlp 'relu' is unknown; use swiglu or gelu"),
    (dict(dropout=1.0), r"dropout 1.0 is not in \[0, 1\)"),
    (dict(head_width=3), r"head width 3 is odd"),
    (dict(norm="batchnorm"), r"norm 'batchnorm' is unknown; use rmsnorm or layernorm"),
    (dict(bias="some"), r"bias 'some' is unknown; use none, qkv or all"),
    (dict(positions="learned"), r"0 learned positions are none; use max_positions"),
  ],
)
def test_impossible_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    TransformerConfig(**{**SHAPE, **changes})


@functools.partial(jax.jit, static_argnums=0)
def logits(stack, params, tokens):
  batch = {"tokens": tokens}
  x = stack.apply_embed(params["embed"], batch)
  for i in range(stack.depth):
    layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
    inputs = dict(batch=batch, key=None, layer=i, microbatch=0, rows=jnp.arange(len(tokens)))
    x = stack.apply_layer(layer, x, False, inputs)
  return head_module(stack, params).logits(x)


@pytest.mark.parametrize("changes", [{}, dict(mlp="gelu", tied=True), lm.GPT2, lm.QWEN2, lm.QWEN3])
def test_a_token_sees_only_those_before_it(changes):
  stack = transformer(TransformerConfig(**{**SHAPE, **changes}))
  batch = lm.batch(2, length=6)
  params = drawn(stack)  # far from zero, so that influence shows
  changed = batch["tokens"].copy()
  changed[:, 4] = (changed[:, 4] + 1) % 16
  a, b = logits(stack, params, batch["tokens"]), logits(stack, params, changed)
  np.testing.assert_allclose(a[:, :4], b[:, :4], atol=1e-6)
  assert float(jnp.abs(a[:, 4:] - b[:, 4:]).min(axis=-1).max()) > 1e-4


def test_the_loss_is_the_cross_entropy_of_the_logits():
  stack = transformer(TransformerConfig(**SHAPE))
  batch = lm.batch(2)
  params = drawn(stack)
  out = logits(stack, params, batch["tokens"])
  picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(out)), batch["targets"][..., None], -1)
  want = -(picked[..., 0] * batch["weights"]).sum()
  from jaxpipe import reference_value_and_grad

  (loss, metrics), _ = reference_value_and_grad(stack, microbatches=1)(params, batch)
  np.testing.assert_allclose(loss, want / batch["weights"].sum(), rtol=1e-5)
  right = (np.argmax(out, -1) == batch["targets"]) * batch["weights"]
  assert float(metrics["correct"]) == right.sum()


def test_rotary_scores_depend_on_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def across(a):
    return jnp.tile(a, (1, 10, 1, 1))

  def turn(a):
    return rotate(across(a), 10_000.0, jnp.arange(10))

  scores = jnp.einsum("BTNH,BSNH->TS", turn(q), turn(k))
  for distance in (0, 1, 5):
    diagonal = jnp.diagonal(scores, -distance)
    np.testing.assert_allclose(diagonal, jnp.full_like(diagonal, diagonal[0]), rtol=1e-5)
  assert abs(scores[1, 0] - scores[5, 0]) > 1e-3


def test_slowed_turns_keep_the_fast_and_divide_the_slow():
  scaling = RopeScaling.parse("8,1,4,64")
  turns = jnp.array([16.0, 4.0, 2.5, 1.0, 0.5])  # within 64 positions
  slowed = scaling(2 * jnp.pi * turns / 64) * 64 / (2 * jnp.pi)
  np.testing.assert_allclose(slowed, [16, 4, 2.5 * (1 + 1 / 8) / 2, 1 / 8, 0.5 / 8], rtol=1e-6)
  assert RopeScaling.parse(str(scaling)) == scaling


@pytest.mark.parametrize(
  "text, message",
  [
    ("8,1", "'8,1' is not FACTOR,LOW,HIGH,LENGTH; use one like 32,1,4,8192"),
    ("8,4,1,64", "low 4 above 0 and below high 1"),
  ],
)
def test_impossible_rope_scaling(text, message):
  with pytest.raises(ValueError, match=message):
    RopeScaling.parse(text)


def test_rows_longer_than_the_learned_positions():
  stack = transformer(TransformerConfig(**{**SHAPE, **lm.GPT2, "max_positions": 4}))
  with pytest.raises(ValueError, match="rows of 5 tokens, and 4 learned positions"):
    stack.check_shapes(lm.batch(2, length=5))


@pytest.mark.parametrize("changes", [{}, dict(head_width=6)])
def test_flops_count_every_weight_that_multiplies(changes):
  config = TransformerConfig(**SHAPE, **changes)
  stack = transformer(config)
  head = config.vocabulary_size * config.width
  layers = sum(
    np.prod(s.shape) for s in jax.tree.leaves(stack.param_shapes()["layers"]) if len(s.shape) == 3
  )
  assert flops_per_token(config, 4) == 6 * (layers + head) + 12 * 2 * 2 * config.H * 4
