"""Connectionist temporal classification: the loss, and how far what is heard is from what was said.

A network gives every frame a symbol or a blank; a word is heard by leaving out repetitions, then
blanks. The loss is that of all the ways in which the frames can spell the word.

Dims: B rows, T frames, N symbols of the longest word, K symbols with the blank, which is 0.

References:
  Graves et al., Connectionist temporal classification, ICML 2006.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def ctc_losses(logits_BTK: jax.Array, frames_B: jax.Array, labels_BN: jax.Array) -> jax.Array:
  """Loss of every row, [B].

  Args:
    logits_BTK: float.
    frames_B: how many frames count.
    labels_BN: int, 1 to K - 1; 0 fills up.
  """
  silent_BT = _beyond(frames_B, logits_BTK.shape[1]).astype(logits_BTK.dtype)
  unsaid_BN = (labels_BN == 0).astype(logits_BTK.dtype)
  with jax.numpy_rank_promotion("allow"):  # optax broadcasts
    losses: jax.Array = optax.ctc_loss(logits_BTK, silent_BT, labels_BN, unsaid_BN)
  return losses


def hear(logits_BTK: jax.Array, frames_B: jax.Array) -> jax.Array:
  """The likeliest symbol of every frame, 0 where it is blank, repeated or beyond: int [B, T]."""
  best_BT = logits_BTK.argmax(axis=-1)
  before_BT = jnp.pad(best_BT, ((0, 0), (1, 0)))[:, :-1]
  new_BT = (best_BT != before_BT) & ~_beyond(frames_B, best_BT.shape[1])
  return jnp.where(new_BT, best_BT, 0)


def edit_distances(heard_BT: jax.Array, labels_BN: jax.Array) -> jax.Array:
  """Insertions, deletions and substitutions between what was heard and said, int [B].

  Args:
    heard_BT: symbols, zeros anywhere are skipped.
    labels_BN: symbols, then zeros.
  """
  B, N = labels_BN.shape
  # distances[j]: of all that was heard so far to the first j symbols.
  start = jnp.broadcast_to(jnp.arange(N + 1), (B, N + 1))

  def more(t: jax.Array, before: jax.Array) -> jax.Array:
    symbol_B = heard_BT[:, t]
    row = [before[:, 0] + 1]
    for j in range(N):
      wrong = (symbol_B != labels_BN[:, j]).astype(before.dtype)
      other = jnp.minimum(before[:, j + 1], row[j]) + 1
      row.append(jnp.minimum(before[:, j] + wrong, other))
    return jnp.where(symbol_B[:, None] == 0, before, jnp.stack(row, axis=1))

  ends = jax.lax.fori_loop(0, heard_BT.shape[1], more, start)
  said_B = (labels_BN > 0).sum(axis=1)
  return jnp.take_along_axis(ends, said_B[:, None], axis=1)[:, 0]


def _beyond(frames_B: jax.Array, frames: int) -> jax.Array:
  """True [B, T] for frames that do not count."""
  return jnp.arange(frames)[None] >= frames_B[:, None]
