"""What a layer knows besides its input: the microbatch, whether it trains, its randomness."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp


class LayerInputs(TypedDict):
  """What one call of one layer is given besides its parameters and x.

  Keys:
    batch: the microbatch's own inputs, leaves `[rows, ...]`.
    key: PRNG key of the step, or None.
    layer: canonical layer number.
    microbatch: its number within the step.
    rows: int32 [rows], each row's number within the whole microbatch over all data shards.
  """

  batch: Any
  key: jax.Array | None
  layer: int | jax.Array
  microbatch: int | jax.Array
  rows: jax.Array


@dataclasses.dataclass
class Context:
  """Handed to each call of each layer.

  Attributes:
    batch: the microbatch's own inputs, leaves `[rows, ...]`.
    training: False in evaluation, where dropout is the identity.
    key: PRNG key of this (step, layer, microbatch), or None where no key was given.
    rows: int32 [rows], each row's number within the whole microbatch over all data shards.
  """

  batch: Any
  training: bool
  key: jax.Array | None
  rows: jax.Array
  _draws: int = 0

  @classmethod
  def create(
    cls,
    training: bool,
    *,
    batch: Any,
    key: jax.Array | None,
    layer: int | jax.Array,
    microbatch: int | jax.Array,
    rows: jax.Array,
  ) -> Context:
    """Derives the layer's key: from layer, then microbatch, and never from stage or tick."""
    if key is not None:
      key = jax.random.fold_in(jax.random.fold_in(key, layer), microbatch)
    return cls(batch, training, key, rows)

  def dropout(
    self,
    x: jax.Array,
    rate: float,
    iteration: int | jax.Array = 0,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """Zeroes elements of x with probability `rate` and scales the rest by `1 / (1 - rate)`.

    Masks are drawn row by row, keyed by (step, layer, microbatch, row) and by the number of the
    call within the layer, so that they are the same under every schedule, mesh and recompute.

    Args:
      x: float array `[rows, ...]`.
      rate: probability in [0, 1).
      positions: int32 [n], where x is `[rows, n, ...]` and its second dim may be cut over the mesh:
        the number of each position in the whole row, which is then part of the key.
      iteration: inside a `lax.scan` or loop, its number; calls are counted while a layer is traced,
        and a loop's body is traced once, so that all iterations would drop alike.

    Raises:
      ValueError: rate outside [0, 1), no key given to the step, or x without the row dim.
    """
    if not 0 <= rate < 1:
      raise ValueError(f"dropout rate {rate} is not in [0, 1)")
    if not self.training or rate == 0:
      return x
    if self.key is None:
      raise ValueError("the stack uses dropout; call the step with a key: step(params, batch, key)")
    if x.shape[:1] != self.rows.shape:
      raise ValueError(f"dropout wants x [{self.rows.shape[0]} rows, ...]; got shape {x.shape}")
    draw = jax.random.fold_in(jax.random.fold_in(self.key, self._draws), iteration)
    self._draws += 1  # counts the calls within one layer while it is traced

    def of_row(row: jax.Array) -> jax.Array:
      key = jax.random.fold_in(draw, row)
      if positions is None:
        return jax.random.bernoulli(key, 1 - rate, x.shape[1:])
      one = lambda p: jax.random.bernoulli(jax.random.fold_in(key, p), 1 - rate, x.shape[2:])  # noqa: E731
      return jax.vmap(one)(positions)

    keep = jax.vmap(of_row)(self.rows)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
