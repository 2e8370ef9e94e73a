"""Softmax cross-entropy with the vocabulary cut over `tensor`, and the logits over positions.

Every device along `tensor` holds V rows of the table. Of each position, three numbers are combined
over the devices in place of all its logits: the maximum, the sum of exponentials, and the logit of
the target (Megatron-LM, Shoeybi et al., arXiv:1909.08053):

    loss = top + log(sum over devices of sum_v exp(logit_v - top)) - logit of the target

Logits are made, used and made again in the backward pass `chunk` positions at a time, so that no
array of tokens x vocabulary is ever whole.

Dims: B rows, T positions, D width, V rows of the table that lie on this device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.models.tables import table_logits
from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import TENSOR


class Sums(NamedTuple):
  """Sums over positions, each a scalar in float32 at least.

  Attributes:
    loss: cross-entropy in nats, times the weights.
    weight: the weights.
    correct: the weights of the positions whose target had the largest logit.
  """

  loss: jax.Array
  weight: jax.Array
  correct: jax.Array


def cross_entropy(
  h_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk: int
) -> Sums:
  """Returns the cross-entropy summed over all positions; arithmetic in float32 at least.

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
    """[B, T, ...] -> [chunks, B, chunk, ...]."""
    return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)

  # Nothing of a chunk is kept but its inputs: its logits are computed again in the backward pass.
  @jax.checkpoint
  def one(sums: Sums, table_VD: jax.Array, piece: tuple[jax.Array, ...]) -> Sums:
    h, targets, weights = piece
    new = _sums(h, table_VD, targets, weights)
    return Sums(*(a + b for a, b in zip(sums, new, strict=True)))

  # From the data: a loop over a mesh may not start from a constant, whose type does not vary.
  zero = 0 * jnp.sum(weights_BT).astype(_wide(h_BTD))
  cut = tuple(map(pieces, (h_BTD, targets_BT, weights_BT)))
  return lax.scan(lambda s, p: (one(s, table_VD, p), None), Sums(zero, zero, zero), cut)[0]


def check_chunk(T: int, chunk: int) -> None:
  """Raises ValueError where T positions cannot be cut into chunks of this size."""
  if T % chunk:
    fits = [n for n in range(1, T + 1) if T % n == 0]
    near = min(fits, key=lambda n: (abs(n - chunk), n))
    raise ValueError(f"{T} positions cannot be cut into chunks of {chunk} logits; use {near}, or 0")


def look_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """Looks up rows of a table that is cut over `tensor`.

  Args:
    table_VD: this device's rows.
    ids_BT: int, rows of the whole table; below zero they count from its end.

  Returns:
    [B, T, D]: the rows that lie on this device, and zeros for the others, so that the sum over
    `tensor` is the rows. An id that has no row in the whole table gives NaN.
  """
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
  """The sums of `cross_entropy`, with the logits of all these positions at once."""
  wide = _wide(h_BTD)
  logits_BTV = table_logits(table_VD.astype(h_BTD.dtype), h_BTD)
  row_BT, inside_BT = _find(targets_BT, len(table_VD))
  own_top_BT = lax.stop_gradient(logits_BTV.max(axis=-1))
  top_BT = axes.largest(own_top_BT, TENSOR)
  total_BT = axes.total(jnp.sum(jnp.exp(logits_BTV - top_BT[..., None]), axis=-1), TENSOR)
  target_BT = jnp.take_along_axis(logits_BTV, row_BT[..., None], axis=-1)[..., 0]
  target_BT = axes.total(jnp.where(inside_BT, target_BT, 0), TENSOR)
  # A target without a row must not pass for one of logit 0, unless it is padding.
  known_BT = (targets_BT >= 0) & (targets_BT < len(table_VD) * axes.size(TENSOR))
  target_BT = jnp.where(known_BT | (weights_BT == 0), target_BT, jnp.nan)
  # Of equal logits the first row is the best, as in the whole table.
  best_BT = jnp.argmax(logits_BTV, axis=-1) + axes.index(TENSOR) * len(table_VD)
  best_BT = axes.smallest(
    jnp.where(own_top_BT == top_BT, best_BT, jnp.iinfo(best_BT.dtype).max), TENSOR
  )
  weights_BT = weights_BT.astype(wide)
  loss = jnp.sum((top_BT + jnp.log(total_BT) - target_BT) * weights_BT)
  right_BT = (best_BT == targets_BT).astype(wide)
  return Sums(loss, jnp.sum(weights_BT), jnp.sum(right_BT * weights_BT))


def _find(ids_BT: jax.Array, V: int) -> tuple[jax.Array, jax.Array]:
  """Rows of ids within this device's piece of the table, 0 for others, and which ids lie in it."""
  row = ids_BT - axes.index(TENSOR) * V
  inside = (row >= 0) & (row < V)
  return jnp.where(inside, row, 0), inside


def _wide(x: jax.Array) -> jnp.dtype:
  """The dtype of losses and sums: that of x, or float32 if it is narrower."""
  return jnp.promote_types(x.dtype, jnp.float32)
