"""CTC against all alignments counted one by one, distances against Levenshtein's recursion."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.models.speech.ctc import ctc_losses, edit_distances, hear

rng = np.random.default_rng(0)


def spelled(path):
  """What the symbols of the frames spell."""
  return tuple(s for s, _ in itertools.groupby(path) if s)


def test_the_loss_counts_every_alignment():
  logits = jnp.asarray(rng.standard_normal((4, 4, 3)), jnp.float32)
  labels, frames = np.array([[1, 2], [1, 1], [2, 0], [0, 0]]), np.array([4, 4, 3, 2])
  for row in range(4):
    logs = np.asarray(jax.nn.log_softmax(logits[row, : frames[row]]))
    want = tuple(label for label in labels[row] if label)
    paths = [p for p in itertools.product(range(3), repeat=len(logs)) if spelled(p) == want]
    chance = sum(np.exp(logs[range(len(logs)), path].sum()) for path in paths)
    np.testing.assert_allclose(ctc_losses(logits, frames, labels)[row], -np.log(chance), rtol=1e-4)


def test_repetitions_then_blanks_are_left_out():
  frames = [1, 1, 0, 1, 2, 2, 0, 2]
  heard = hear(jax.nn.one_hot(jnp.asarray([frames]), 3), jnp.asarray([7]))
  np.testing.assert_array_equal(heard, [[1, 0, 0, 1, 2, 0, 0, 0]])


def test_distances_are_levenshtein_s():
  @functools.cache
  def levenshtein(a, b):
    if not a or not b:
      return len(a) + len(b)
    change = levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    return min(change, levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1)

  heard = rng.integers(3, size=(40, 6))
  labels = rng.integers(1, 3, size=(40, 4)) * (np.arange(4) < rng.integers(5, size=(40, 1)))
  want = [
    levenshtein(tuple(a[a > 0].tolist()), tuple(b[b > 0].tolist()))
    for a, b in zip(heard, labels, strict=True)
  ]
  np.testing.assert_array_equal(edit_distances(jnp.asarray(heard), jnp.asarray(labels)), want)
