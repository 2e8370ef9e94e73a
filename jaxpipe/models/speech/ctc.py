"""Connectionist temporal classification (CTC): the loss, greedy decoding, and edit distances.

A network gives every frame a symbol or a blank. A word is decoded by leaving out repetitions, then
blanks. The loss is the negative logarithm of the probability of all the ways in which the frames
can spell the word:

    frames    h h - e - l l - l o        (- is blank)
    decoded   h     e   l     l o

Dims: B rows, T frames, N symbols of the longest word, K symbols with the blank, which is 0.

References:
  Graves et al., Connectionist temporal classification, ICML 2006.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def ctc_losses(logits_BTK: jax.Array, frames_B: jax.Array, labels_BN: jax.Array) -> jax.Array:
  """Returns the loss of every row in nats, [B].

  Args:
    logits_BTK: float, logits of the symbols at each frame.
    frames_B: int, number of frames of each row that count; the others are padding.
    labels_BN: int, the symbols of the word, 1 to K - 1, then zeros.
  """
  silent_BT = _beyond(frames_B, logits_BTK.shape[1]).astype(logits_BTK.dtype)
  unsaid_BN = (labels_BN == 0).astype(logits_BTK.dtype)
  with jax.numpy_rank_promotion("allow"):  # optax broadcasts
    losses: jax.Array = optax.ctc_loss(logits_BTK, silent_BT, labels_BN, unsaid_BN)
  return losses


def hear(logits_BTK: jax.Array, frames_B: jax.Array) -> jax.Array:
  """Decodes greedily: the likeliest symbol of every frame that begins one.

  Args:
    logits_BTK: float, logits of the symbols at each frame.
    frames_B: int, number of frames of each row that count.

  Returns:
    int [B, T]: a symbol, or 0 where the frame is blank, repeats the frame before, or is padding.
  """
  best_BT = logits_BTK.argmax(axis=-1)
  before_BT = jnp.pad(best_BT, ((0, 0), (1, 0)))[:, :-1]
  new_BT = (best_BT != before_BT) & ~_beyond(frames_B, best_BT.shape[1])
  return jnp.where(new_BT, best_BT, 0)


def edit_distances(heard_BT: jax.Array, labels_BN: jax.Array) -> jax.Array:
  """Returns the least number of insertions, deletions and substitutions, int [B] (Levenshtein).

  Args:
    heard_BT: int, symbols as `hear` returns them; zeros anywhere are skipped.
    labels_BN: int, symbols of the word, then zeros.
  """
  B, N = labels_BN.shape
  # Dynamic programming, one row of the table at a time: entry j is the distance between all that
  # was heard so far and the first j symbols of the word.
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
  """Where frames are padding: bool [B, T]."""
  return jnp.arange(frames)[None] >= frames_B[:, None]
