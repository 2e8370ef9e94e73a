"""How activations enter and leave the part of a layer whose matrices are cut over axis `tensor`.

Attention and MLP both begin with matrices that are cut along their outputs and end with one that is
cut along its inputs, which leaves a part of a sum on each of t devices. Between two such parts,
activations are either replicated over `tensor`, or cut by positions (`positions_cut`), which
divides norms, dropout and what travels between stages by t as well:

                    replicated                          positions_cut
    enter_tensor    nothing; backwards a sum            all-gather; backwards a reduce-scatter
    leave_tensor    a sum; backwards nothing            reduce-scatter; backwards an all-gather

A ring's sum is a reduce-scatter and an all-gather, so both send the same bytes.

References:
  Replicated: Shoeybi et al., Megatron-LM, arXiv:1909.08053, whose f and g these are.
  Cut by positions: Korthikanti et al., arXiv:2205.05198 (sequence parallelism).

Dims: B rows, T positions, D width.
"""

from __future__ import annotations

import jax
from jax import lax

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import TENSOR


def enter_tensor(x_BTD: jax.Array, positions_cut: bool) -> jax.Array:
  """Returns x with all positions, for matrices that are cut along their outputs.

  Args:
    x_BTD: [B, T, D], the same on every device along `tensor`; or this device's [B, T / t, D].
    positions_cut: whether x is cut over `tensor` by positions, [B, T / t, D].

  Returns:
    [B, T, D], the same on every device along `tensor`.
  """
  # A replicated x is used as it is. Backwards the cotangents of all devices must be added: that is
  # the transpose of the sum in `leave_tensor`, because every value varies over `tensor` (`axes`).
  return axes.gather(x_BTD, TENSOR, 1) if positions_cut else x_BTD


def leave_tensor(x_BTD: jax.Array, positions_cut: bool) -> jax.Array:
  """Sums the partial products of matrices that are cut along their inputs over `tensor`.

  Args:
    x_BTD: [B, T, D], this device's term of the sum, for all T positions.
    positions_cut: whether to return only this device's T / t positions of the sum.

  Returns:
    The sum: [B, T, D] on every device, or [B, T / t, D].
  """
  return axes.scatter(x_BTD, TENSOR, 1) if positions_cut else axes.total(x_BTD, TENSOR)


def own_piece(at_T: jax.Array, positions_cut: bool) -> jax.Array:
  """Selects this device's T / t entries of an array by position, if `positions_cut`.

  Args:
    at_T: [T], an entry for each position that a device has between `enter_tensor` and
      `leave_tensor`.
    positions_cut: whether activations elsewhere are cut over `tensor` by positions.

  Returns:
    [T / t] if they are, else `at_T` itself.
  """
  if not positions_cut:
    return at_T
  n = len(at_T) // axes.size(TENSOR)
  piece: jax.Array = lax.dynamic_slice_in_dim(at_T, axes.index(TENSOR) * n, n)
  return piece
