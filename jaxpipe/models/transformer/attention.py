"""Causal attention over rows whose positions lie over axis `sequence`.

Three ways, by how many of the c devices trade positions for heads (`ulysses`):

    1           ring attention: queries stay, keys and values visit (Ring Self-Attention, Li et al.,
                arXiv 2105.13120; blockwise, Liu et al., arXiv 2310.01889)
    c           every device attends over the whole row with some of the heads (DeepSpeed-Ulysses,
                arXiv 2309.14509)
    between     both: groups of `ulysses` devices trade, and blocks visit group by group (USP,
                arXiv 2405.07719)

A group holds an early and a late run of the row (see `jaxpipe.parallel.sequence`), so a block of
keys is two halves, and a visit is two products of halves without a mask, on every device:

    keys from          early keys   late keys
    own     early q    [1] causal   -
            late q     [2]          [1] causal
    before  early q    [4]          -
            late q     [3]          -
    after   early q    -            -
            late q     [3]          [4]

[3] is always the same; of [4] the operands are chosen, never the branch.

Parts are merged by the online softmax (Milakov and Gimelshein, arXiv 1805.02867) in float32 at
least. The backward pass has a rule of its own, FlashAttention's (arXiv 2205.14135): keys and values
visit again, and the scores of one half block at a time are computed again from the softmax's
normalizer. Differentiated by JAX, those of all visits would be there at once. Every product has
batch dims, so that residual policies which save products with weights alone save no scores.

Dims: B batch rows, T queries, S keys, L positions of the whole row, N query heads, K key/value
heads, G = N / K queries that share a key head, H head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel import axes, sequence
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR

Core = Callable[..., jax.Array]
Parts = TypeVar("Parts", bound=NamedTuple)


def check_heads(heads: int, kv_heads: int, tensor: int, ulysses: int, sequence: int) -> None:
  """Says whether the heads can be cut over the mesh.

  Args:
    heads: query heads of the model.
    kv_heads: key/value heads of the model.
    tensor: devices along `tensor`, over which both are cut.
    ulysses: devices along `sequence` that trade positions for heads.
    sequence: devices along `sequence`.

  Raises:
    ValueError: one of the numbers does not divide the other.
  """
  for name, count in (("heads", heads), ("kv_heads", kv_heads)):
    if count % tensor:
      below, above = count // tensor * tensor, (count // tensor + 1) * tensor
      near = f"{below} or {above}" if below else f"{above}"
      raise ValueError(f"{count} {name} cannot be cut over {TENSOR}:{tensor}; use {near} {name}")
  own = heads // tensor
  fits = [n for n in range(1, sequence + 1) if sequence % n == 0 and own % n == 0]
  if ulysses in fits:
    return
  near = " or ".join(
    map(str, [n for n in fits if n < ulysses][-1:] + [n for n in fits if n > ulysses][:1])
  )
  if ulysses < 1 or sequence % ulysses:
    raise ValueError(
      f"ulysses={ulysses} does not divide the {sequence} devices of {SEQUENCE}:{sequence};"
      f" use ulysses={near}"
    )
  cut = f" ({heads} over {TENSOR}:{tensor})" if tensor > 1 else ""
  raise ValueError(
    f"ulysses={ulysses} over {SEQUENCE}:{sequence} does not divide the {own} heads of a device"
    f"{cut}; use ulysses={near}"
  )


def attend(
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  *,
  core: Core,
  ulysses: int = 1,
  segments_BS: jax.Array | None = None,
  length: int,
) -> jax.Array:
  """Causal attention with grouped-query heads; head n reads key head n // (N / K).

  Args:
    query_BTNH: [B, T, N, H], this device's positions and heads; T = length / c.
    key_BTKH: [B, T, K, H], K a divisor of N.
    value_BTKH: [B, T, K, H].
    core: `(query, key, value, is_causal=True) -> mixed`, used where a device has whole rows in
      natural order and no segments: on an axis of one device, and with `ulysses` = c.
    ulysses: devices that trade positions for heads; divides c and N. Without an axis (c = 1) it
      means nothing.
    segments_BS: int [B, length], the documents of the whole rows: queries see keys of their own.
      None: the row is one document.
    length: positions of the whole row.

  Returns:
    [B, T, N, H] in the query's dtype.

  Raises:
    ValueError: shapes that do not divide, or that are not those of `length`.
  """
  c, T, N, K = axes.size(SEQUENCE), *query_BTNH.shape[1:3], key_BTKH.shape[2]
  ulysses = ulysses if c > 1 else 1
  _check_shapes(T, c, length, segments_BS)
  check_heads(N, K, 1, ulysses, c)
  # As many copies of each key head as give all devices of a group the same number.
  copies = math.lcm(K, ulysses) // K
  if copies > 1:
    key_BTKH, value_BTKH = (jnp.repeat(x, copies, axis=2) for x in (key_BTKH, value_BTKH))
  q, k, v = (sequence.to_heads(x, ulysses) for x in (query_BTNH, key_BTKH, value_BTKH))
  if c > ulysses:
    mixed = _visited(q, k, v, segments_BS, ulysses)
  elif segments_BS is None:
    mixed = core(q, k, v, is_causal=True)
  else:
    asked, keys = _Asked(_by_key_head(q, k), segments_BS), _Keys(k, v, segments_BS)
    mixed = _result(_add(None, asked, keys, causal=True), q.dtype)
  return sequence.to_positions(mixed, ulysses)


class _Asked(NamedTuple):
  """Queries, by key head, and their segments."""

  query_BTKGH: jax.Array
  segments_BT: jax.Array | None


class _Keys(NamedTuple):
  """Keys, values and their segments."""

  key_BSKH: jax.Array
  value_BSKH: jax.Array
  segments_BS: jax.Array | None


class _Mixed(NamedTuple):
  """What a softmax over some of the keys is so far: values and weights, both times exp(-top)."""

  top_BKGT1: jax.Array
  weight_BKGT1: jax.Array
  value_BKGTH: jax.Array


class _Known(NamedTuple):
  """What the backward pass knows of queries: logsumexp of their scores, d, and d times the result.

  d is the cotangent of the result.
  """

  logsumexp_BKGT1: jax.Array
  d_BKGTH: jax.Array
  product_BKGT1: jax.Array


class _Grads(NamedTuple):
  """Cotangents from one block."""

  query_BTKGH: jax.Array
  key_BSKH: jax.Array
  value_BSKH: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _visited(
  q: jax.Array, k: jax.Array, v: jax.Array, segments_BS: jax.Array | None, ulysses: int
) -> jax.Array:
  """Attention of this group's queries over all keys, its own and those of the others."""
  return _visited_forward(q, k, v, segments_BS, ulysses)[0]


def _visited_forward(
  q: jax.Array, k: jax.Array, v: jax.Array, segments_BS: jax.Array | None, ulysses: int
) -> tuple[jax.Array, tuple]:
  own = sequence.own_group(ulysses)
  early_q, late_q = _asked_halves(q, k, segments_BS, ulysses)
  early_k, late_k = _key_halves(k, v, segments_BS, own, ulysses)
  # Every position sees itself: after [1] no top is -inf.
  early = _add(None, early_q, early_k, causal=True)  # [1]
  late = _add(_add(None, late_q, late_k, causal=True), late_q, early_k)  # [1] [2]
  for other, key, value in zip(sequence.others(ulysses), *_arrivals(ulysses, k, v), strict=True):
    # One visit after the other, or many blocks and their scores would wait for each other.
    early, late, key, value = lax.optimization_barrier((early, late, key, value))
    early_k, late_k = _key_halves(key, value, segments_BS, other, ulysses)
    late = _add(late, late_q, early_k)  # [3]
    before = other < own
    some_q, some_k = _choose(before, early_q, late_q), _choose(before, early_k, late_k)
    one = _add(_choose(before, early, late), some_q, some_k)  # [4]
    early, late = _choose(before, one, early), _choose(before, late, one)
  mixed = jnp.concatenate([_result(early, q.dtype), _result(late, q.dtype)], axis=1)
  sums = [half.top_BKGT1 + jnp.log(half.weight_BKGT1) for half in (early, late)]
  return mixed, (q, k, v, segments_BS, mixed, sums)


def _visited_backward(
  ulysses: int, saved: tuple, d_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  # Behind the barrier, or XLA would keep the scores of the forward pass for here.
  (q, k, v, segments_BS, mixed, sums), d_BTNH = lax.optimization_barrier((saved, d_BTNH))
  own = sequence.own_group(ulysses)
  early_q, late_q = _asked_halves(q, k, segments_BS, ulysses)
  early, late = _known_halves(k, mixed, sums, d_BTNH)
  early_k, late_k = _key_halves(k, v, segments_BS, own, ulysses)
  one = _back(early_q, early, early_k, causal=True)  # [1]
  two = _back(late_q, late, early_k)  # [2]
  three = _back(late_q, late, late_k, causal=True)  # [1]
  dq_early, dq_late = one.query_BTKGH, two.query_BTKGH + three.query_BTKGH
  dk, dv = (
    jnp.concatenate([a + b, c], axis=1) for a, b, c in zip(one[1:], two[1:], three[1:], strict=True)
  )
  arrived, send_back = jax.vjp(functools.partial(_arrivals, ulysses), k, v)
  sent: tuple[list[jax.Array], list[jax.Array]] = [], []
  for other, key, value in zip(sequence.others(ulysses), *arrived, strict=True):
    dq_early, dq_late, key, value = lax.optimization_barrier((dq_early, dq_late, key, value))
    early_k, late_k = _key_halves(key, value, segments_BS, other, ulysses)
    before = other < own
    some_q, some_k = _choose(before, early_q, late_q), _choose(before, early_k, late_k)
    three = _back(late_q, late, early_k)  # [3]
    four = _back(some_q, _choose(before, early, late), some_k)  # [4]
    of_early, of_late = _choose(before, four, _none(four)), _choose(before, _none(four), four)
    dq_early = dq_early + of_early.query_BTKGH
    dq_late = dq_late + three.query_BTKGH + of_late.query_BTKGH
    for to, of, a, b, c in zip(sent, (k, v), three[1:], of_early[1:], of_late[1:], strict=True):
      to.append(jnp.concatenate([a + b, c], axis=1).astype(of.dtype))
  for_k, for_v = send_back(sent)
  dq = jnp.concatenate([dq_early, dq_late], axis=1).reshape(q.shape)
  return dq.astype(q.dtype), dk.astype(k.dtype) + for_k, dv.astype(v.dtype) + for_v, None


_visited.defvjp(_visited_forward, _visited_backward)


def _arrivals(ulysses: int, k: jax.Array, v: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
  """Keys and values of the other groups."""
  return list(sequence.arriving(k, ulysses)), list(sequence.arriving(v, ulysses))


def _asked_halves(
  q: jax.Array, k: jax.Array, segments_BS: jax.Array | None, ulysses: int
) -> tuple[_Asked, _Asked]:
  """This group's early and late queries."""
  early, late = jnp.split(_by_key_head(q, k), 2, axis=1)
  ids = _segment_halves(segments_BS, sequence.own_group(ulysses), ulysses)
  return _Asked(early, ids[0]), _Asked(late, ids[1])


def _key_halves(
  k: jax.Array,
  v: jax.Array,
  segments_BS: jax.Array | None,
  group: jax.Array | int,
  ulysses: int,
) -> tuple[_Keys, _Keys]:
  """Early and late keys of a group."""
  (early_k, late_k), (early_v, late_v) = (jnp.split(x, 2, axis=1) for x in (k, v))
  ids = _segment_halves(segments_BS, group, ulysses)
  return _Keys(early_k, early_v, ids[0]), _Keys(late_k, late_v, ids[1])


def _segment_halves(
  segments_BS: jax.Array | None, group: jax.Array | int, ulysses: int
) -> tuple[jax.Array | None, jax.Array | None]:
  if segments_BS is None:
    return None, None
  return sequence.group_halves(segments_BS, ulysses, group=group)


def _known_halves(
  k: jax.Array, mixed_BTNH: jax.Array, sums: list[jax.Array], d_BTNH: jax.Array
) -> tuple[_Known, _Known]:
  """What the backward pass knows of early and late queries."""
  mixed, d = (_by_key_head(x, k).transpose(0, 2, 3, 1, 4) for x in (mixed_BTNH, d_BTNH))
  wide = sums[0].dtype
  product = jnp.sum(mixed.astype(wide) * d.astype(wide), axis=-1, keepdims=True)
  early, late = zip(*(jnp.split(x, 2, axis=3) for x in (d, product)), strict=True)
  return _Known(sums[0], *early), _Known(sums[1], *late)


def _add(so_far: _Mixed | None, asked: _Asked, keys: _Keys, causal: bool = False) -> _Mixed:
  """Lets the queries see these keys as well; `causal` where both are the same positions."""
  scores_BKGTS = _scores(asked, keys, causal)
  # The result does not depend on the top, so neither does its derivative.
  top_BKGT1 = jnp.max(lax.stop_gradient(scores_BKGTS), axis=-1, keepdims=True)
  if so_far is not None:
    top_BKGT1 = jnp.maximum(so_far.top_BKGT1, top_BKGT1)
  weight_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
  weight_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
  value_BKGTH = _product("BKGTS,BSKH->BKGTH", weight_BKGTS, keys.value_BSKH)
  if so_far is not None:
    shrink_BKGT1 = jnp.exp(so_far.top_BKGT1 - top_BKGT1)
    weight_BKGT1 = weight_BKGT1 + shrink_BKGT1 * so_far.weight_BKGT1
    value_BKGTH = value_BKGTH + shrink_BKGT1 * so_far.value_BKGTH
  return _Mixed(top_BKGT1, weight_BKGT1, value_BKGTH)


def _back(asked: _Asked, known: _Known, keys: _Keys, causal: bool = False) -> _Grads:
  """Cotangents of these queries, keys and values from what the ones see of the others."""
  weight_BKGTS = jnp.exp(_scores(asked, keys, causal) - known.logsumexp_BKGT1)
  d_BKGTS = _product("BSKH,BKGTH->BKGTS", keys.value_BSKH, known.d_BKGTH)
  d_BKGTS = weight_BKGTS * (d_BKGTS - known.product_BKGT1) * _scale(asked)
  grads = _Grads(
    _product("BKGTS,BSKH->BTKGH", d_BKGTS, keys.key_BSKH),
    _product("BKGTS,BTKGH->BSKH", d_BKGTS, asked.query_BTKGH),
    _product("BKGTS,BKGTH->BSKH", weight_BKGTS, known.d_BKGTH),
  )
  # All three now, or scores of many blocks may wait for the products that are not yet needed.
  return lax.optimization_barrier(grads)


def _scores(asked: _Asked, keys: _Keys, causal: bool) -> jax.Array:
  """[B, K, G, T, S], -inf where a query does not see a key."""
  scores_BKGTS = _product("BTKGH,BSKH->BKGTS", asked.query_BTKGH, keys.key_BSKH) * _scale(asked)
  if causal:
    T = asked.query_BTKGH.shape[1]
    at = [lax.broadcasted_iota(jnp.int32, (1, 1, 1, T, T), dim) for dim in (3, 4)]
    scores_BKGTS = jnp.where(at[0] >= at[1], scores_BKGTS, -jnp.inf)
  if asked.segments_BT is not None and keys.segments_BS is not None:
    same_BTS = asked.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
    scores_BKGTS = jnp.where(same_BTS[:, None, None], scores_BKGTS, -jnp.inf)
  return scores_BKGTS


def _scale(asked: _Asked) -> float:
  return float(asked.query_BTKGH.shape[-1]) ** -0.5


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Operands of the dtype of b, sums in float32 at least."""
  wide = jnp.promote_types(b.dtype, jnp.float32)
  return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide)


def _by_key_head(x_BTNH: jax.Array, key_BSKH: jax.Array) -> jax.Array:
  """[B, T, K, G, H]."""
  B, T, _, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, key_BSKH.shape[2], -1, H)


def _result(mixed: _Mixed, dtype: jnp.dtype) -> jax.Array:
  """The softmax's mean of the values: [B, T, N, H]."""
  value_BKGTH = (mixed.value_BKGTH / mixed.weight_BKGT1).astype(dtype)
  B, K, G, T, H = value_BKGTH.shape
  return jnp.transpose(value_BKGTH, (0, 3, 1, 2, 4)).reshape(B, T, K * G, H)


def _choose(first: jax.Array, one: Parts, other: Parts) -> Parts:
  chosen: Parts = jax.tree.map(functools.partial(jnp.where, first), one, other)
  return chosen


def _none(grads: _Grads) -> _Grads:
  return jax.tree.map(jnp.zeros_like, grads)


def _check_shapes(T: int, c: int, length: int, segments_BS: jax.Array | None) -> None:
  sequence.check_divides(length, c)
  if T * c != length:
    raise ValueError(
      f"{T} positions on each device of {SEQUENCE}:{c} are not a row of {length}; use {length // c}"
    )
  if segments_BS is not None and segments_BS.shape[1] != length:
    raise ValueError(
      f"segments of {segments_BS.shape[1]} positions for rows of {length}; every device takes those"
      " of the whole row"
    )
