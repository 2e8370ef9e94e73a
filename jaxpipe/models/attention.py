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
least. Every product has batch dims, so that residual policies which save products with weights
alone save no scores.

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
  raise ValueError(
    f"ulysses={ulysses} over {SEQUENCE}:{sequence} does not divide the {own} heads of a device"
    f" ({heads} over {TENSOR}:{tensor}); use ulysses={near}"
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


def _visited(
  q: jax.Array, k: jax.Array, v: jax.Array, segments_BS: jax.Array | None, ulysses: int
) -> jax.Array:
  """Attention of this group's queries over all keys, its own and those of the others."""
  own = sequence.own_group(ulysses)
  queries = (_by_key_head(q, k),)
  early_q, late_q = (_Asked(*half) for half in _halves(queries, segments_BS, own, ulysses))
  early_k, late_k = (_Keys(*half) for half in _halves((k, v), segments_BS, own, ulysses))
  # Every position sees itself: after [1] no top is -inf.
  early = _add(None, early_q, early_k, causal=True)  # [1]
  late = _add(_add(None, late_q, late_k, causal=True), late_q, early_k)  # [1] [2]
  visits = (sequence.others(ulysses), *(sequence.arriving(x, ulysses) for x in (k, v)))
  for other, k, v in zip(*visits, strict=True):
    early_k, late_k = (_Keys(*half) for half in _halves((k, v), segments_BS, other, ulysses))
    late = _add(late, late_q, early_k)  # [3]
    before = other < own
    some_q, some_k = _choose(before, early_q, late_q), _choose(before, early_k, late_k)
    one = _add(_choose(before, early, late), some_q, some_k)  # [4]
    early, late = _choose(before, one, early), _choose(before, late, one)
  return jnp.concatenate([_result(early, q.dtype), _result(late, q.dtype)], axis=1)


def _halves(
  arrays: tuple[jax.Array, ...],
  segments_BS: jax.Array | None,
  group: jax.Array | int,
  ulysses: int,
) -> tuple[tuple, tuple]:
  """Early and late half of arrays of a group, each with its segments."""
  pairs = [jnp.split(x, 2, axis=1) for x in arrays]
  ids: tuple = (None, None)
  if segments_BS is not None:
    ids = sequence.group_halves(segments_BS, ulysses, group=group)
  early, late = zip(*pairs, ids, strict=True)
  return early, late


def _add(so_far: _Mixed | None, asked: _Asked, keys: _Keys, causal: bool = False) -> _Mixed:
  """Lets the queries see these keys as well; `causal` where both are the same positions."""
  wide = jnp.promote_types(asked.query_BTKGH.dtype, jnp.float32)
  scores_BKGTS = jnp.einsum(
    "BTKGH,BSKH->BKGTS", asked.query_BTKGH, keys.key_BSKH, preferred_element_type=wide
  ) * (asked.query_BTKGH.shape[-1] ** -0.5)
  for seen in _seen(asked, keys, causal):
    scores_BKGTS = jnp.where(seen, scores_BKGTS, -jnp.inf)
  # The result does not depend on the top, so neither does its derivative.
  top_BKGT1 = jnp.max(lax.stop_gradient(scores_BKGTS), axis=-1, keepdims=True)
  if so_far is not None:
    top_BKGT1 = jnp.maximum(so_far.top_BKGT1, top_BKGT1)
  weight_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
  weight_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
  value_BKGTH = jnp.einsum(
    "BKGTS,BSKH->BKGTH",
    weight_BKGTS.astype(keys.value_BSKH.dtype),
    keys.value_BSKH,
    preferred_element_type=wide,
  )
  if so_far is not None:
    shrink_BKGT1 = jnp.exp(so_far.top_BKGT1 - top_BKGT1)
    weight_BKGT1 = weight_BKGT1 + shrink_BKGT1 * so_far.weight_BKGT1
    value_BKGTH = value_BKGTH + shrink_BKGT1 * so_far.value_BKGTH
  return _Mixed(top_BKGT1, weight_BKGT1, value_BKGTH)


def _seen(asked: _Asked, keys: _Keys, causal: bool) -> list[jax.Array]:
  """Masks, [1 or B, 1, 1, T, S]."""
  masks = []
  if causal:
    T = asked.query_BTKGH.shape[1]
    at = [lax.broadcasted_iota(jnp.int32, (1, 1, 1, T, T), dim) for dim in (3, 4)]
    masks.append(at[0] >= at[1])
  if asked.segments_BT is not None and keys.segments_BS is not None:
    same_BTS = asked.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
    masks.append(same_BTS[:, None, None])
  return masks


def _by_key_head(query_BTNH: jax.Array, key_BSKH: jax.Array) -> jax.Array:
  """[B, T, K, G, H]."""
  B, T, _, H = query_BTNH.shape
  return query_BTNH.reshape(B, T, key_BSKH.shape[2], -1, H)


def _result(mixed: _Mixed, dtype: jnp.dtype) -> jax.Array:
  """The softmax's mean of the values: [B, T, N, H]."""
  value_BKGTH = (mixed.value_BKGTH / mixed.weight_BKGT1).astype(dtype)
  B, K, G, T, H = value_BKGTH.shape
  return jnp.transpose(value_BKGTH, (0, 3, 1, 2, 4)).reshape(B, T, K * G, H)


def _choose(first: jax.Array, one: Parts, other: Parts) -> Parts:
  chosen: Parts = jax.tree.map(functools.partial(jnp.where, first), one, other)
  return chosen


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
