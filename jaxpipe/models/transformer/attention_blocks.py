"""Attention of a block of queries to a block of keys, in pieces that can be merged in any order.

The softmax of a row of scores can be computed over some of the keys at a time (Milakov and
Gimelshein, online softmax, arXiv 1805.02867). For each query three numbers are carried: the largest
score so far, the sum of exp(score - largest), and that sum with each term times its value:

    top    = max_s score_s
    weight = sum_s exp(score_s - top)
    value  = sum_s exp(score_s - top) value_s         result = value / weight

Another block of keys adds its own sums, after both are brought to the larger top. `add` does that
in the forward pass. `back` gives the cotangents of one block of queries and one of keys, by
FlashAttention's rule (arXiv 2205.14135), from the normalizer of the whole softmax:

    P  = exp(score - logsumexp)                       the softmax's share, computed again
    dP = d value^T                                    d: cotangent of the result
    dS = P (dP - sum_h d_h result_h)

Sums are in float32 at least. Every product has batch dims (rows and heads), so that residual
policies which save products with weights alone save no scores.

Dims: B batch rows, T queries, S keys, N query heads, K key/value heads, G = N / K queries that
share a key head, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Queries(NamedTuple):
  """A block of queries.

  Attributes:
    query_BTKGH: the queries, grouped by the key head that they read.
    segments_BT: int, the document that each belongs to; None: all keys are of its document.
  """

  query_BTKGH: jax.Array
  segments_BT: jax.Array | None


class Keys(NamedTuple):
  """A block of keys and their values.

  Attributes:
    key_BSKH: the keys.
    value_BSKH: their values.
    segments_BS: int, the document that each belongs to; None as in `Queries`.
  """

  key_BSKH: jax.Array
  value_BSKH: jax.Array
  segments_BS: jax.Array | None


class Mixed(NamedTuple):
  """A softmax over some of the keys: the running sums of the module's docstring.

  Attributes:
    top_BKGT1: largest score of each query so far.
    weight_BKGT1: sum of exp(score - top).
    value_BKGTH: sum of exp(score - top) times the value.
  """

  top_BKGT1: jax.Array
  weight_BKGT1: jax.Array
  value_BKGTH: jax.Array


class Known(NamedTuple):
  """A block of queries after the forward pass, as `back` needs it.

  Attributes:
    logsumexp_BKGT1: logarithm of the softmax's normalizer, over all keys.
    d_BKGTH: cotangent of the attention's result.
    product_BKGT1: sum over H of the cotangent times the result.
  """

  logsumexp_BKGT1: jax.Array
  d_BKGTH: jax.Array
  product_BKGT1: jax.Array


class Grads(NamedTuple):
  """Cotangents from one block of queries and one of keys.

  Attributes:
    query_BTKGH: of the queries.
    key_BSKH: of the keys.
    value_BSKH: of the values.
  """

  query_BTKGH: jax.Array
  key_BSKH: jax.Array
  value_BSKH: jax.Array


def add(so_far: Mixed | None, queries: Queries, keys: Keys, causal: bool = False) -> Mixed:
  """Lets a block of queries see another block of keys.

  Args:
    so_far: the sums over the keys that were seen before; None for the first block. The first block
      must have a key that each query sees, or its top is -inf.
    queries: the queries.
    keys: keys that they have not seen yet.
    causal: whether both blocks are the same positions, of which a query sees its own and earlier
      ones. Else it sees all keys of its document.
  """
  scores_BKGTS = _scores(queries, keys, causal)
  # The result does not depend on the top, so neither does its derivative.
  top_BKGT1 = jnp.max(lax.stop_gradient(scores_BKGTS), axis=-1, keepdims=True)
  if so_far is not None:
    top_BKGT1 = jnp.maximum(so_far.top_BKGT1, top_BKGT1)
  weight_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
  weight_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
  value_BKGTH = _product("BKGTS,BSKH->BKGTH", weight_BKGTS, keys.value_BSKH)
  if so_far is not None:
    # What was summed under the old top, under the new one.
    shrink_BKGT1 = jnp.exp(so_far.top_BKGT1 - top_BKGT1)
    weight_BKGT1 = weight_BKGT1 + shrink_BKGT1 * so_far.weight_BKGT1
    value_BKGTH = value_BKGTH + shrink_BKGT1 * so_far.value_BKGTH
  return Mixed(top_BKGT1, weight_BKGT1, value_BKGTH)


def result(mixed: Mixed, dtype: jnp.dtype) -> jax.Array:
  """Returns the softmax's mean of the values, after the last block: [B, T, N, H] in `dtype`."""
  value_BKGTH = (mixed.value_BKGTH / mixed.weight_BKGT1).astype(dtype)
  B, K, G, T, H = value_BKGTH.shape
  return jnp.transpose(value_BKGTH, (0, 3, 1, 2, 4)).reshape(B, T, K * G, H)


def back(queries: Queries, known: Known, keys: Keys, causal: bool = False) -> Grads:
  """Returns the cotangents of queries, keys and values from what these queries see of these keys.

  Args:
    queries, keys, causal: as `add` was given them in the forward pass.
    known: what the forward pass found for these queries.
  """
  weight_BKGTS = jnp.exp(_scores(queries, keys, causal) - known.logsumexp_BKGT1)
  d_BKGTS = _product("BSKH,BKGTH->BKGTS", keys.value_BSKH, known.d_BKGTH)
  # The cotangent of the products, before they were scaled: a factor for queries and keys alike.
  d_BKGTS = weight_BKGTS * (d_BKGTS - known.product_BKGT1) * _scale(queries)
  grads = Grads(
    _product("BKGTS,BSKH->BTKGH", d_BKGTS, keys.key_BSKH),
    _product("BKGTS,BTKGH->BSKH", d_BKGTS, queries.query_BTKGH),
    _product("BKGTS,BKGTH->BSKH", weight_BKGTS, known.d_BKGTH),
  )
  # All three now, or scores of many blocks may wait for the products that are not yet needed.
  return lax.optimization_barrier(grads)


def by_key_head(x_BTNH: jax.Array, key_BSKH: jax.Array) -> jax.Array:
  """Groups query heads by the key head that they read: [B, T, N, H] -> [B, T, K, G, H]."""
  B, T, _, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, key_BSKH.shape[2], -1, H)


def _scores(queries: Queries, keys: Keys, causal: bool) -> jax.Array:
  """Scores [B, K, G, T, S], -inf where a query does not see a key."""
  scores_BKGTS = _product("BTKGH,BSKH->BKGTS", queries.query_BTKGH, keys.key_BSKH)
  scores_BKGTS = scores_BKGTS * _scale(queries)
  if causal:
    T = queries.query_BTKGH.shape[1]
    at = [lax.broadcasted_iota(jnp.int32, (1, 1, 1, T, T), dim) for dim in (3, 4)]
    scores_BKGTS = jnp.where(at[0] >= at[1], scores_BKGTS, -jnp.inf)
  if queries.segments_BT is not None and keys.segments_BS is not None:
    same_BTS = queries.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
    scores_BKGTS = jnp.where(same_BTS[:, None, None], scores_BKGTS, -jnp.inf)
  return scores_BKGTS


def _scale(queries: Queries) -> float:
  """The factor of the scores, 1 / sqrt(H)."""
  return float(queries.query_BTKGH.shape[-1]) ** -0.5


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """An einsum with both operands in the dtype of b, summed in float32 at least."""
  wide = jnp.promote_types(b.dtype, jnp.float32)
  return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide)
