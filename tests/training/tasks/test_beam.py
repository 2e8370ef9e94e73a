"""Beam search against exhaustive search, over a model that is a table."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.training.tasks.beam import beam_search

PAD, BEGIN, END, V, T, B = 0, 1, 2, 5, 4, 3
IDS = dict(begin=BEGIN, end=END, pad=PAD)


def table(seed):
  """Logits of the next token by row, position and token: [B, T, V, V]."""
  return 2 * jax.random.normal(jax.random.key(seed), (B, T, V, V))


def follow(table_BTVV, beams):
  def after(tokens_NT, t):
    row_N = jnp.arange(B).repeat(beams)
    return table_BTVV[row_N, t, tokens_NT[:, t]]

  return after


def answers():
  """All that can be said: up to T of the words, with END where there is room for it."""
  words = [i for i in range(V) if i not in (PAD, BEGIN, END)]
  for n in range(T + 1):
    for said in itertools.product(words, repeat=n):
      yield [*said, END][:T]


def score(table_TVV, said, penalty):
  total, before = 0.0, BEGIN
  for t, token in enumerate(said):
    logits = table_TVV[t, before].copy()
    logits[[PAD, BEGIN]] = -np.inf
    total += logits[token] - np.logaddexp.reduce(logits)
    before = token
  return total / ((5 + len(said)) / 6) ** penalty


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [0.0, 0.6])
def test_with_all_beams_the_best_answer_is_found(seed, penalty):
  # 16 beams hold every prefix of a table with 2 words and 4 positions.
  found = beam_search(follow(table(seed), 16), B, T, **IDS, beams=16, penalty=penalty)
  for row, all_TVV in zip(found.tolist(), np.asarray(table(seed), np.float64), strict=True):
    best = max(answers(), key=lambda said: score(all_TVV, said, penalty))
    assert row == best + [PAD] * (T - len(best))


def test_one_beam_takes_the_likeliest_token_each_time():
  said = beam_search(follow(table(0), 1), B, T, **IDS)
  for row, all_TVV in zip(said.tolist(), np.asarray(table(0)), strict=True):
    want, before = [], BEGIN
    while len(want) < T and before != END:
      logits = all_TVV[len(want), before].copy()
      logits[[PAD, BEGIN]] = -np.inf
      before = int(logits.argmax())
      want.append(before)
    assert row == want + [PAD] * (T - len(want))


def test_more_beams_never_find_a_worse_answer_here():
  scores = []
  for beams in (1, 2, 16):
    found = beam_search(follow(table(4), beams), B, T, **IDS, beams=beams, penalty=0.0)
    rows = [[i for i in row if i != PAD] for row in found.tolist()]
    tables = np.asarray(table(4), np.float64)
    scores.append([score(t, row, 0.0) for t, row in zip(tables, rows, strict=True)])
  assert np.all(np.array(scores[2]) >= np.array(scores[1]) - 1e-6)
  assert np.all(np.array(scores[2]) >= np.array(scores[0]) - 1e-6)


def test_decoding_stops_when_all_have_ended():
  steps = []

  def after(tokens_NT, t):
    jax.debug.callback(lambda t: steps.append(int(t)), t)
    return jnp.zeros((len(tokens_NT), V)).at[:, END].set(9.0)

  said = beam_search(after, B, T, **IDS)
  jax.effects_barrier()
  assert said.tolist() == [[END, PAD, PAD, PAD]] * B and steps == [0]
