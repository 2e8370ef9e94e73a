"""Beam search over any model that gives logits of the next token; with one beam, greedy decoding.

Shapes are static: one program serves every batch of so many rows. Each step asks for the logits
after a prefix that is padded to its full length, so no cache of keys and values is kept. For one
row and K = 2 beams:

    [1] logits of what follows each beam         K x V candidates, by log probability
    [2] a beam that has ended continues by PAD   at no cost, so that it competes with the others
    [3] the K best candidates                    each continues a beam, whose prefix it takes over
    [4] when all have ended, or at length T      the best by log probability and length wins

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

# (tokens int32 [B*K, T], t int32 []) -> logits [B*K, V] of what follows tokens[:, :t + 1]; row
# b*K + k is beam k of row b. Tokens begin with BEGIN; those after position t are padding.
Next = Callable[[jax.Array, jax.Array], jax.Array]


class _Beams(NamedTuple):
  """The best answers so far, the best first in each row.

  Attributes:
    at: int32 [], number of tokens that they have.
    said_BKT: int32 [B, K, T], their tokens, then padding.
    score_BK: float [B, K], their log probabilities.
    ended_BK: bool [B, K], whether they have said END.
  """

  at: jax.Array
  said_BKT: jax.Array
  score_BK: jax.Array
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
  """Searches for the best answer of every row.

  Args:
    follow: the model, `(tokens [B*K, T], t) -> logits [B*K, V]`; see `Next`.
    rows: B.
    length: T; an answer without END after so many tokens ends there.
    begin, end, pad: ids; `pad` and `begin` are never part of an answer.
    beams: K.
    penalty: answers are compared by log probability / ((5 + tokens) / 6)^penalty.

  Returns:
    int32 [B, T]: ids, END, padding.
  """

  def step(now: _Beams) -> _Beams:
    said_BKT = now.said_BKT
    # [1] What has been said, shifted: the model reads BEGIN first.
    tokens = jnp.concatenate([jnp.full_like(said_BKT[..., :1], begin), said_BKT[..., :-1]], axis=-1)
    logits_NV = follow(tokens.reshape(rows * beams, length), now.at)
    logits_NV = logits_NV.at[:, jnp.array([pad, begin])].set(-jnp.inf)
    logs_BKV = jax.nn.log_softmax(logits_NV).reshape(rows, beams, -1)
    V = logs_BKV.shape[-1]
    # [2]
    nothing_V = jnp.where(jnp.arange(V) == pad, 0.0, -jnp.inf).astype(logs_BKV.dtype)
    logs_BKV = jnp.where(now.ended_BK[..., None], nothing_V[None, None], logs_BKV)
    # [3] A candidate's number is beam * V + token.
    all_BN = (now.score_BK[..., None] + logs_BKV).reshape(rows, beams * V)
    score_BK, best_BK = lax.top_k(all_BN, beams)
    beam_BK, token_BK = best_BK // V, (best_BK % V).astype(said_BKT.dtype)
    said_BKT = jnp.take_along_axis(said_BKT, beam_BK[..., None], axis=1)
    said_BKT = lax.dynamic_update_slice_in_dim(said_BKT, token_BK[..., None], now.at, axis=2)
    ended_BK = jnp.take_along_axis(now.ended_BK, beam_BK, axis=1) | (token_BK == end)
    return _Beams(now.at + 1, said_BKT, score_BK, ended_BK)

  # At first all beams are the same empty answer: only one of them may be continued.
  first_BK = jnp.zeros((rows, beams)).at[:, 1:].set(-jnp.inf)
  start = _Beams(
    jnp.int32(0),
    jnp.full((rows, beams, length), pad, jnp.int32),
    first_BK,
    jnp.zeros((rows, beams), bool),
  )

  def unfinished(now: _Beams) -> jax.Array:
    return (now.at < length) & ~jnp.all(now.ended_BK)

  last = lax.while_loop(unfinished, step, start)
  # [4]
  tokens_BK = jnp.sum(last.said_BKT != pad, axis=-1)
  best_B = jnp.argmax(last.score_BK / ((5 + tokens_BK) / 6) ** penalty, axis=1)
  return jnp.take_along_axis(last.said_BKT, best_B[:, None, None], axis=1)[:, 0]
