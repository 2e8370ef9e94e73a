"""Beam search over any model that says what comes next; with one beam, greedy decoding.

Shapes are static: one program serves every batch of so many rows. Each step asks for the logits
after a prefix that is padded to its full length, so no cache of keys and values is kept.

References:
  Wu et al., Google's Neural Machine Translation System, arXiv:1609.08144, section 7: the penalty.

Dims: B rows, K beams, T longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# (tokens [B*K, T], t) -> logits [B*K, V] of what follows tokens[:, :t + 1]; row b*K + k is beam k
# of row b. Tokens begin with BEGIN; those after t are padding.
Next = Callable[[jax.Array, jax.Array], jax.Array]


class _Beams(NamedTuple):
  """The best prefixes so far, best first."""

  at: jax.Array  # int32 []: tokens said
  said_BKT: jax.Array
  score_BK: jax.Array  # their log probability
  ended_BK: jax.Array


def beam_search(
  follow: Next,
  rows: int,
  length: int,
  *,
  begin: int,
  end: int,
  pad: int,
  beams: int = 1,
  penalty: float = 0.6,
) -> jax.Array:
  """Returns the best answer of every row, int32 [B, T]: ids, END, padding.

  Args:
    follow: see `Next`.
    rows: B.
    length: T; an answer without END after so many tokens is cut.
    begin, end, pad: ids; `pad` and `begin` are never said.
    beams: K.
    penalty: answers are compared by log probability / ((5 + tokens) / 6)^penalty.
  """

  def step(now: _Beams) -> _Beams:
    said_BKT = now.said_BKT
    # What has been said, shifted: the model reads BEGIN first.
    tokens = jnp.concatenate([jnp.full_like(said_BKT[..., :1], begin), said_BKT[..., :-1]], axis=-1)
    logits_NV = follow(tokens.reshape(rows * beams, length), now.at)
    logits_NV = logits_NV.at[:, jnp.array([pad, begin])].set(-jnp.inf)
    logs_BKV = jax.nn.log_softmax(logits_NV).reshape(rows, beams, -1)
    V = logs_BKV.shape[-1]
    # An ended answer has one way on: nothing more, at no cost.
    nothing_V = jnp.where(jnp.arange(V) == pad, 0.0, -jnp.inf).astype(logs_BKV.dtype)
    logs_BKV = jnp.where(now.ended_BK[..., None], nothing_V[None, None], logs_BKV)
    all_BN = (now.score_BK[..., None] + logs_BKV).reshape(rows, beams * V)
    score_BK, best_BK = lax.top_k(all_BN, beams)
    beam_BK, token_BK = best_BK // V, (best_BK % V).astype(said_BKT.dtype)
    said_BKT = jnp.take_along_axis(said_BKT, beam_BK[..., None], axis=1)
    said_BKT = lax.dynamic_update_slice_in_dim(said_BKT, token_BK[..., None], now.at, axis=2)
    ended_BK = jnp.take_along_axis(now.ended_BK, beam_BK, axis=1) | (token_BK == end)
    return _Beams(now.at + 1, said_BKT, score_BK, ended_BK)

  # At first all beams are the same empty answer: only one of them counts.
  first_BK = jnp.zeros((rows, beams)).at[:, 1:].set(-jnp.inf)
  start = _Beams(
    jnp.int32(0),
    jnp.full((rows, beams, length), pad, jnp.int32),
    first_BK,
    jnp.zeros((rows, beams), bool),
  )
  going = lambda now: (now.at < length) & ~jnp.all(now.ended_BK)  # noqa: E731
  last = lax.while_loop(going, step, start)
  tokens_BK = jnp.sum(last.said_BKT != pad, axis=-1)
  best_B = jnp.argmax(last.score_BK / ((5 + tokens_BK) / 6) ** penalty, axis=1)
  return jnp.take_along_axis(last.said_BKT, best_B[:, None, None], axis=1)[:, 0]
