"""Causal attention where queries stay and the keys of other groups of devices visit, one by one.

A group holds an early and a late run of the row (zig-zag, see `jaxpipe.parallel.sequence`), so a
block of keys is two halves, and a visit is two products of halves without a mask, on every device:

    keys from          early keys   late keys
    own     early q    [1] causal   -
            late q     [2]          [1] causal
    before  early q    [4]          -
            late q     [3]          -
    after   early q    -            -
            late q     [3]          [4]

[3] is the same product for every visitor. Of [4] the operands are chosen by `where`, never the
branch: devices of one group of the mesh must run the same program.

The backward pass has a rule of its own: keys and values visit again, and the scores of one half
block at a time are computed again. Differentiated by JAX, the scores of all visits would be in
memory at once.

References:
  Ring Self-Attention: Li et al., arXiv 2105.13120. Ring Attention: Liu et al., arXiv 2310.01889.

Dims: as in `attention_blocks`; but T positions of a group and S of the whole row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.models.transformer.attention_blocks import (
  Grads,
  Keys,
  Known,
  Queries,
  add,
  back,
  by_key_head,
  result,
)
from jaxpipe.parallel import sequence

Parts = TypeVar("Parts", bound=NamedTuple)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segments_BS: jax.Array | None, ulysses: int
) -> jax.Array:
  """Attention of this group's queries over all keys, its own and those of the other groups.

  Args:
    q: [B, T, N, H], this group's queries, of some of the heads.
    k, v: [B, T, K, H], this group's keys and values.
    segments_BS: int, the documents of the whole rows; None: each row is one document.
    ulysses: devices of a group.

  Returns:
    [B, T, N, H] in the queries' dtype.
  """
  return _forward(q, k, v, segments_BS, ulysses)[0]


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, segments_BS: jax.Array | None, ulysses: int
) -> tuple[jax.Array, tuple]:
  """The result, and what the backward pass needs: inputs, result, and each half's logsumexp."""
  own = sequence.own_group(ulysses)
  early_q, late_q = _query_halves(q, k, segments_BS, ulysses)
  early_k, late_k = _key_halves(k, v, segments_BS, own, ulysses)
  # Every position sees itself: after [1] no top is -inf.
  early = add(None, early_q, early_k, causal=True)  # [1]
  late = add(add(None, late_q, late_k, causal=True), late_q, early_k)  # [1] [2]
  for other, key, value in zip(sequence.others(ulysses), *_arrivals(ulysses, k, v), strict=True):
    # One visit after the other, or many blocks and their scores would wait for each other.
    early, late, key, value = lax.optimization_barrier((early, late, key, value))
    early_k, late_k = _key_halves(key, value, segments_BS, other, ulysses)
    late = add(late, late_q, early_k)  # [3]
    before = other < own
    some_q, some_k = _choose(before, early_q, late_q), _choose(before, early_k, late_k)
    one = add(_choose(before, early, late), some_q, some_k)  # [4]
    early, late = _choose(before, one, early), _choose(before, late, one)
  mixed = jnp.concatenate([result(early, q.dtype), result(late, q.dtype)], axis=1)
  sums = [half.top_BKGT1 + jnp.log(half.weight_BKGT1) for half in (early, late)]
  return mixed, (q, k, v, segments_BS, mixed, sums)


def _backward(
  ulysses: int, saved: tuple, d_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """Cotangents of q, k and v; what a visitor's keys and values get is sent back to it."""
  # Behind the barrier, or XLA would keep the scores of the forward pass for here.
  (q, k, v, segments_BS, mixed, sums), d_BTNH = lax.optimization_barrier((saved, d_BTNH))
  own = sequence.own_group(ulysses)
  early_q, late_q = _query_halves(q, k, segments_BS, ulysses)
  early, late = _known_halves(k, mixed, sums, d_BTNH)
  early_k, late_k = _key_halves(k, v, segments_BS, own, ulysses)
  one = back(early_q, early, early_k, causal=True)  # [1]
  two = back(late_q, late, early_k)  # [2]
  three = back(late_q, late, late_k, causal=True)  # [1]
  dq_early, dq_late = one.query_BTKGH, two.query_BTKGH + three.query_BTKGH
  dk, dv = (
    jnp.concatenate([a + b, c], axis=1) for a, b, c in zip(one[1:], two[1:], three[1:], strict=True)
  )
  # The transpose of the exchange brings each block's cotangents home, and adds them there.
  arrived, send_back = jax.vjp(functools.partial(_arrivals, ulysses), k, v)
  sent: tuple[list[jax.Array], list[jax.Array]] = [], []
  for other, key, value in zip(sequence.others(ulysses), *arrived, strict=True):
    dq_early, dq_late, key, value = lax.optimization_barrier((dq_early, dq_late, key, value))
    early_k, late_k = _key_halves(key, value, segments_BS, other, ulysses)
    before = other < own
    some_q, some_k = _choose(before, early_q, late_q), _choose(before, early_k, late_k)
    three = back(late_q, late, early_k)  # [3]
    four = back(some_q, _choose(before, early, late), some_k)  # [4]
    # [4] was of the early halves or of the late ones: the others get zeros from it.
    of_early, of_late = _choose(before, four, _zeros(four)), _choose(before, _zeros(four), four)
    dq_early = dq_early + of_early.query_BTKGH
    dq_late = dq_late + three.query_BTKGH + of_late.query_BTKGH
    for to, of, a, b, c in zip(sent, (k, v), three[1:], of_early[1:], of_late[1:], strict=True):
      to.append(jnp.concatenate([a + b, c], axis=1).astype(of.dtype))
  for_k, for_v = send_back(sent)
  dq = jnp.concatenate([dq_early, dq_late], axis=1).reshape(q.shape)
  return dq.astype(q.dtype), dk.astype(k.dtype) + for_k, dv.astype(v.dtype) + for_v, None


ring_attention.defvjp(_forward, _backward)


def _arrivals(ulysses: int, k: jax.Array, v: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
  """Keys and values of the other groups, in the order of `sequence.others`."""
  return list(sequence.arriving(k, ulysses)), list(sequence.arriving(v, ulysses))


def _query_halves(
  q: jax.Array, k: jax.Array, segments_BS: jax.Array | None, ulysses: int
) -> tuple[Queries, Queries]:
  """This group's early and late queries."""
  early, late = jnp.split(by_key_head(q, k), 2, axis=1)
  ids = _segment_halves(segments_BS, sequence.own_group(ulysses), ulysses)
  return Queries(early, ids[0]), Queries(late, ids[1])


def _key_halves(
  k: jax.Array,
  v: jax.Array,
  segments_BS: jax.Array | None,
  group: jax.Array | int,
  ulysses: int,
) -> tuple[Keys, Keys]:
  """Early and late keys of a group, given its block."""
  (early_k, late_k), (early_v, late_v) = (jnp.split(x, 2, axis=1) for x in (k, v))
  ids = _segment_halves(segments_BS, group, ulysses)
  return Keys(early_k, early_v, ids[0]), Keys(late_k, late_v, ids[1])


def _segment_halves(
  segments_BS: jax.Array | None, group: jax.Array | int, ulysses: int
) -> tuple[jax.Array | None, jax.Array | None]:
  """The documents of a group's early and late positions; every device knows those of whole rows."""
  if segments_BS is None:
    return None, None
  return sequence.group_halves(segments_BS, ulysses, group=group)


def _known_halves(
  k: jax.Array, mixed_BTNH: jax.Array, sums: list[jax.Array], d_BTNH: jax.Array
) -> tuple[Known, Known]:
  """This group's early and late queries, as the backward pass needs them."""
  mixed, d = (by_key_head(x, k).transpose(0, 2, 3, 1, 4) for x in (mixed_BTNH, d_BTNH))
  wide = sums[0].dtype
  product = jnp.sum(mixed.astype(wide) * d.astype(wide), axis=-1, keepdims=True)
  early, late = zip(*(jnp.split(x, 2, axis=3) for x in (d, product)), strict=True)
  return Known(sums[0], *early), Known(sums[1], *late)


def _choose(first: jax.Array, one: Parts, other: Parts) -> Parts:
  """Every array of `one` where `first` (bool []) is true, else that of `other`."""
  chosen: Parts = jax.tree.map(functools.partial(jnp.where, first), one, other)
  return chosen


def _zeros(grads: Grads) -> Grads:
  """Cotangents of nothing."""
  return jax.tree.map(jnp.zeros_like, grads)
