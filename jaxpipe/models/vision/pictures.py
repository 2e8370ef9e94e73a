"""Convolution and maximum over windows as operations on shifted pictures, which are fast on a CPU.

XLA has operations for both. But on a CPU, inside a loop (and a pipeline is one), the backward of
XLA's convolution takes 4 to 25 times as long as that of a matrix product of shifted pictures, and
the backward of its maximum over windows 4 times as long as that of a maximum of shifted pictures.
On an accelerator take XLA's own convolution, `lax.conv_general_dilated`. For windows of 3 and
stride 1, along one dim:

    x                      a b c d
    shifted by 0, 1, 2     0 a b c     a b c d     b c d 0       window i: element i of each

Dims: B batch rows, H and W picture, C and D channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# A convolution as `nnx.Conv(conv_general_dilated=...)` takes it.
Convolution = Callable[..., jax.Array]


def convolve(
  x_BHWC: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str, **options: Any
) -> jax.Array:
  """A convolution as one matrix product, for `nnx.Conv(conv_general_dilated=convolve)`.

  Args:
    x_BHWC: float [B, H, W, C].
    kernel: float [height, width, C, D].
    strides: pixels from one window to the next, along H and along W.
    padding: `SAME`; no other is supported.
    **options: the other arguments that `nnx.Conv` passes; only `precision` has an effect.

  Returns:
    [B, ceil(H / strides[0]), ceil(W / strides[1]), D].

  Raises:
    ValueError: another padding, dilated windows, or channels in groups.
  """
  dilations = (*options.get("lhs_dilation", ()), *options.get("rhs_dilation", ()))
  groups = options.get("feature_group_count", 1)
  if padding != "SAME" or set(dilations) - {1} or groups != 1:
    raise ValueError(
      f"convolve has padding SAME, no dilation and one group; got {padding}, {dilations}, {groups}:"
      " use lax.conv_general_dilated"
    )
  rows = _shifted(x_BHWC, 1, kernel.shape[0], strides[0], 0.0)
  windows = [shift for row in rows for shift in _shifted(row, 2, kernel.shape[1], strides[1], 0.0)]
  matrix = kernel.reshape(-1, kernel.shape[-1])
  return jnp.matmul(jnp.concatenate(windows, axis=-1), matrix, precision=options.get("precision"))


# Convolutions by the names that flags take.
CONVOLUTIONS: dict[str, Convolution] = {"matmul": convolve, "xla": lax.conv_general_dilated}


def max_pool(x_BHWC: jax.Array, size: int, stride: int) -> jax.Array:
  """Returns the maximum over square windows, padded as `SAME` pads; equals share the gradient.

  Args:
    x_BHWC: float [B, H, W, C].
    size: height and width of a window.
    stride: pixels from one window to the next.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), C].
  """
  for dim in (1, 2):
    x_BHWC = functools.reduce(jnp.maximum, _shifted(x_BHWC, dim, size, stride, -jnp.inf))
  return x_BHWC


def _shifted(x: jax.Array, dim: int, size: int, stride: int, edge: float) -> list[jax.Array]:
  """Arrays with element i of every window along a dim, for i in 0 ... size - 1.

  Args:
    x: [...].
    dim: the dim along which windows lie.
    size: elements of a window.
    stride: elements from one window to the next.
    edge: value of the elements of windows that lie outside of x.
  """
  long = x.shape[dim]
  short = -(-long // stride)
  missing = max((short - 1) * stride + size - long, 0)
  pads = [(0, 0)] * x.ndim
  pads[dim] = (missing // 2, missing - missing // 2)
  padded = jnp.pad(x, pads, constant_values=edge)
  last = (short - 1) * stride + 1
  return [lax.slice_in_dim(padded, i, i + last, stride, axis=dim) for i in range(size)]
