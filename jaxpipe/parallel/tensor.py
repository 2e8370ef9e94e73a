"""How a layer goes in and out of `tensor`: replicated outside of it, or cut by positions.

                      replicated (Megatron-LM, arXiv:1909.08053)   positions_cut (arXiv:2205.05198)
    enter_tensor      nothing; backwards, a sum                    all-gather; backwards, a
                                                                   reduce-scatter
    leave_tensor      a sum; backwards, nothing                    reduce-scatter; backwards, an
                                                                   all-gather

A ring's sum is a reduce-scatter and an all-gather, so both send the same bytes.

Dims: B rows, T positions, D width.
"""

from __future__ import annotations

import jax
from jax import lax

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import TENSOR


def enter_tensor(x_BTD: jax.Array, positions_cut: bool) -> jax.Array:
  """X with all positions, for matrices that are cut along their outputs."""
  return axes.gather(x_BTD, TENSOR, 1) if positions_cut else x_BTD


def leave_tensor(x_BTD: jax.Array, positions_cut: bool) -> jax.Array:
  """The sum of what matrices cut along their inputs gave, whole or this device's positions."""
  return axes.scatter(x_BTD, TENSOR, 1) if positions_cut else axes.total(x_BTD, TENSOR)


def own_piece(at_T: jax.Array, positions_cut: bool) -> jax.Array:
  """The positions that this device has outside of `tensor`, of all T inside it."""
  if not positions_cut:
    return at_T
  n = len(at_T) // axes.size(TENSOR)
  piece: jax.Array = lax.dynamic_slice_in_dim(at_T, axes.index(TENSOR) * n, n)
  return piece
