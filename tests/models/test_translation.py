"""The encoder-decoder: what may see what, padding, its loss, and its shapes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.translation import (
  DecoderLayer,
  Embed,
  EncoderLayer,
  Head,
  TranslationConfig,
  attend,
  parse_shape,
)
from jaxpipe.stack.context import Context

SHAPE = dict(vocabulary_size=11, layers=2, width=8, hidden=16, heads=2)
FLOAT64 = dict(dtype=jnp.float64, param_dtype=jnp.float64)


@functools.cache
def modules(config):
  rngs = nnx.Rngs(3)
  layers = [EncoderLayer] * config.layers + [DecoderLayer] * config.layers
  return [kind(config, rngs) for kind in (Embed, *layers, Head)]


def run(config, batch):
  """Streams after the last layer, logits, and what the head returns, without dropout."""
  embed, *layers, head = modules(config)
  x = embed(batch)
  for layer in layers:
    x = layer(x, Context(batch, False, None, jnp.arange(len(batch["source"]))))
  return x, head.logits(x), head(x, batch)


def batch(source_lengths=(5, 3), target_lengths=(4, 6), S=5, T=6):
  rng = np.random.default_rng(0)
  source, tokens, targets = (rng.integers(1, 11, (2, n), np.int32) for n in (S, T, T))
  weights = np.zeros((2, T))
  for row, (s, t) in enumerate(zip(source_lengths, target_lengths, strict=True)):
    source[row, s:] = tokens[row, t:] = targets[row, t:] = 0
    weights[row, :t] = 1
  return {"source": source, "tokens": tokens, "targets": targets, "weights": weights}


def padded(batch, S, T):
  def grow(a, n):
    return np.pad(a, ((0, 0), (0, n)))

  return {name: grow(a, S if name == "source" else T) for name, a in batch.items()}


def test_padding_changes_nothing(float64):
  config = TranslationConfig(**SHAPE, **FLOAT64)
  _, short, sums = run(config, batch())
  _, long, more = run(config, padded(batch(), 3, 2))
  np.testing.assert_allclose(long[:, :6], short, rtol=0, atol=1e-13)
  for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(more), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-13)


def test_what_padding_embeds_is_read_by_no_one(float64):
  config = TranslationConfig(**SHAPE, **FLOAT64)
  embed = modules(config)[0]
  _, before, sums = run(config, batch())
  table = embed.table[...]
  embed.table[...] = table.at[0].set(1e3)
  _, after, more = run(config, batch())
  embed.table[...] = table
  real = batch()["weights"] > 0
  np.testing.assert_array_equal(np.asarray(after)[real], np.asarray(before)[real])
  assert sums[0] == more[0]


def test_a_row_of_padding_alone_is_finite():
  _, logits, (loss, weight, _) = run(TranslationConfig(**SHAPE), batch((0, 5), (0, 6)))
  assert jnp.isfinite(logits).all() and jnp.isfinite(loss) and weight == 6


def test_a_target_sees_the_whole_source_and_what_stands_before():
  config = TranslationConfig(**SHAPE)
  _, before, _ = run(config, batch())
  changed = batch()
  changed["tokens"][:, 3] = changed["tokens"][:, 3] % 10 + 1
  _, after, _ = run(config, changed)
  moved = np.abs(np.asarray(after - before)).max(axis=-1)
  assert moved[:, :3].max() == 0 and moved[:, 3].min() > 1e-4
  changed = batch()
  changed["source"][:, 2] = changed["source"][:, 2] % 10 + 1
  x, after, _ = run(config, changed)
  assert np.abs(np.asarray(after - before)).max(axis=-1).min() > 1e-5
  # Within the source, every position that is not padding sees every other.
  moved = np.abs(np.asarray(x.encoded - run(config, batch())[0].encoded)).max(axis=-1)
  assert moved[0].min() > 1e-5 and moved[1, :3].min() > 1e-5 and moved[1, 3:].min() > 1e-5


def test_layers_pass_on_what_is_not_theirs():
  config, b = TranslationConfig(**SHAPE), batch()
  embed, first, *_, last, _ = modules(config)
  context = Context(b, False, None, jnp.arange(2))
  x = embed(b)
  assert first(x, context).decoded is x.decoded
  assert last(x, context).encoded is x.encoded


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_loss_is_the_cross_entropy_with_smoothed_targets(share):
  config = TranslationConfig(**SHAPE, label_smoothing=share)
  b = batch()
  _, logits, (loss, weight, metrics) = run(config, b)
  logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  one_hot = np.eye(11)[b["targets"]]
  smooth = -((1 - share) * one_hot + share / 11) * logs
  np.testing.assert_allclose(loss, (smooth.sum(-1) * b["weights"]).sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics["nats"], -(one_hot * logs).sum(-1)[b["weights"] > 0].sum())
  right = (np.asarray(logits).argmax(-1) == b["targets"]) * b["weights"]
  assert metrics["correct"] == right.sum() and weight == 10


def test_attention_is_exact_in_float64_and_hides(float64):
  query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 4, 3, 5))
  seen = np.random.default_rng(0).random((2, 1, 4, 4)) < 0.6
  seen[..., 0] = True
  got = attend(query, key, value, jnp.asarray(seen))
  for b in range(2):
    for q in range(4):
      for n in range(3):
        keys = np.flatnonzero(seen[b, 0, q])
        scores = np.asarray(key[b, keys, n] @ query[b, q, n]) / math.sqrt(5)
        shares = np.exp(scores - scores.max())
        want = shares / shares.sum() @ np.asarray(value[b, keys, n])
        np.testing.assert_allclose(got[b, q, n], want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
  "shape, billions", [("T(6,8192,16)", 0.4), ("T(24,8192,16)", 1.3), ("T(64,16384,32)", 6.0)]
)
def test_gpipes_shapes_have_gpipes_sizes(shape, billions):
  layers, hidden, heads = parse_shape(shape)
  config = TranslationConfig(
    vocabulary_size=64_000, layers=layers, width=1024, hidden=hidden, heads=heads, head_width=64
  )
  count = {}
  for kind in (Embed, EncoderLayer, DecoderLayer):
    state = nnx.state(nnx.eval_shape(lambda kind=kind: kind(config, nnx.Rngs(0))), nnx.Param)
    count[kind] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
  total = count[Embed] + layers * (count[EncoderLayer] + count[DecoderLayer])
  assert total == pytest.approx(billions * 1e9, rel=0.15)


@pytest.mark.parametrize("shape", ["6,8192,16", "T(6,8192)", "T(6,8192,-1)", "T(6, 8192, 16) "])
def test_other_notations_are_refused(shape):
  with pytest.raises(ValueError, match=r"is not T\(layers,hidden,heads\); use one like T\(6"):
    parse_shape(shape)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(width=9), r"width 9 is odd; .* use 10"),
    (dict(heads=3), r"width 8 cannot be cut into 3 heads"),
    (dict(layers=0), r"a size below 1"),
    (dict(dropout=1.0), r"dropout 1.0 is not in \[0, 1\)"),
    (dict(label_smoothing=-0.1), r"label_smoothing -0.1 is not in \[0, 1\)"),
  ],
)
def test_impossible_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    TranslationConfig(**{**SHAPE, **changes})
