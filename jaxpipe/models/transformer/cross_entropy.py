"""Softmax cross-entropy with the vocabulary cut over `tensor`, and the logits over positions.

Every device along `tensor` holds V / t rows of the table. Maxima, sums of exponentials and the
logits of the targets meet: three numbers a position in place of V (Megatron-LM, arXiv:1909.08053).
Logits are made, used and made again in the backward pass `chunk` positions at a time, so that no
array of tokens x vocabulary is ever whole.

Dims: B rows, T positions, D width, V rows of the table that lie here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import TENSOR


class Sums(NamedTuple):
  """Sums over positions: loss in nats, weight, and targets that had the largest logit."""

  loss: jax.Array
  weight: jax.Array
  correct: jax.Array


def cross_entropy(
  h_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk: int
) -> Sums:
  """Sums over all positions; arithmetic in float32 at least.

  Args:
    h_BTD: what the table multiplies, the same on all devices along `tensor`.
    table_VD: this device's rows.
    targets_BT: int, rows of the whole table; others make the loss NaN, but where the weight is 0.
    weights_BT: 0 for padding.
    chunk: positions whose logits live at once; 0: all.

  Raises:
    ValueError: chunk does not divide T.
  """
  B, T = targets_BT.shape
  if not chunk or chunk >= T:
    return _sums(h_BTD, table_VD, targets_BT, weights_BT)
  check_chunk(T, chunk)

  def pieces(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(sums: Sums, table_VD: jax.Array, piece: tuple[jax.Array, ...]) -> Sums:
    h, targets, weights = piece
    new = _sums(h, table_VD, targets, weights)
    return Sums(*(a + b for a, b in zip(sums, new, strict=True)))

  # From the data: a loop over a mesh may not start from a constant.
  zero = 0 * jnp.sum(weights_BT).astype(_wide(h_BTD))
  cut = tuple(map(pieces, (h_BTD, targets_BT, weights_BT)))
  return lax.scan(lambda s, p: (one(s, table_VD, p), None), Sums(zero, zero, zero), cut)[0]


def check_chunk(T: int, chunk: int) -> None:
  """Raises ValueError where so many positions cannot be cut into chunks of this size."""
  if T % chunk:
    fits = [n for n in range(1, T + 1) if T % n == 0]
    near = min(fits, key=lambda n: (abs(n - chunk), n))
    raise ValueError(f"{T} positions cannot be cut into chunks of {chunk} logits; use {near}, or 0")


def look_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """This device's share of the rows `ids`, [B, T, D]: their sum over `tensor` is the rows."""
  if axes.size(TENSOR) == 1:
    return jnp.take(table_VD, ids_BT, axis=0)
  V = len(table_VD)
  # Below zero they count from the end, as in the whole table.
  ids_BT = jnp.where(ids_BT < 0, ids_BT + V * axes.size(TENSOR), ids_BT)
  row, inside = _find(ids_BT, V)
  rows_BTD = jnp.where(inside[..., None], jnp.take(table_VD, row, axis=0), 0)
  # As in the whole table: what has no row is NaN.
  known = (ids_BT >= 0) & (ids_BT < V * axes.size(TENSOR))
  return jnp.where(known[..., None], rows_BTD, jnp.nan)


def _sums(
  h_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> Sums:
  wide = _wide(h_BTD)
  table_VD = table_VD.astype(h_BTD.dtype)
  logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, table_VD, preferred_element_type=wide)
  row_BT, inside_BT = _find(targets_BT, len(table_VD))
  mine_BT = lax.stop_gradient(logits_BTV.max(axis=-1))
  top_BT = axes.largest(mine_BT, TENSOR)
  total_BT = axes.total(jnp.sum(jnp.exp(logits_BTV - top_BT[..., None]), axis=-1), TENSOR)
  own_BT = jnp.take_along_axis(logits_BTV, row_BT[..., None], axis=-1)[..., 0]
  own_BT = axes.total(jnp.where(inside_BT, own_BT, 0), TENSOR)
  # A target that has no row is padding, or else must not pass for a number.
  known_BT = (targets_BT >= 0) & (targets_BT < len(table_VD) * axes.size(TENSOR))
  own_BT = jnp.where(known_BT | (weights_BT == 0), own_BT, jnp.nan)
  # Of equal logits the first row is the best, as in the whole table.
  best_BT = jnp.argmax(logits_BTV, axis=-1) + axes.index(TENSOR) * len(table_VD)
  best_BT = axes.smallest(
    jnp.where(mine_BT == top_BT, best_BT, jnp.iinfo(best_BT.dtype).max), TENSOR
  )
  weights_BT = weights_BT.astype(wide)
  loss = jnp.sum((top_BT + jnp.log(total_BT) - own_BT) * weights_BT)
  right_BT = (best_BT == targets_BT).astype(wide)
  return Sums(loss, jnp.sum(weights_BT), jnp.sum(right_BT * weights_BT))


def _find(ids_BT: jax.Array, V: int) -> tuple[jax.Array, jax.Array]:
  """Rows within this device's piece of the table, and which of the ids lie in it."""
  row = ids_BT - axes.index(TENSOR) * V
  inside = (row >= 0) & (row < V)
  return jnp.where(inside, row, 0), inside


def _wide(x: jax.Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)
