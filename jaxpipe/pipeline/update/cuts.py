"""One variable on one device: reading its piece, joining pieces to the whole, and cutting it again.

It is all used inside `shard_map`. A *piece* is what a device holds of one variable, as its array
lies: a block of the variable's own dims, or a window of a packed row, which may contain some of the
variables beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel import axes as axis
from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.placing import own_pieces
from jaxpipe.parallel.rules import axes_of_entry

# Name of a reduction -> (of a device's elements, over devices, the value that changes nothing).
_REDUCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[Any], Any]]] = {
  "reduce_sum": (jnp.sum, lax.psum, lambda _: 0),
  "reduce_max": (jnp.max, lax.pmax, lambda dtype: _least(dtype)),
  "reduce_min": (jnp.min, lax.pmin, lambda dtype: _greatest(dtype)),
  "reduce_and": (jnp.all, lax.pmin, lambda _: True),
  "reduce_or": (jnp.any, lax.pmax, lambda _: False),
}


class Cut(Protocol):
  """How one variable of this device lies in its array.

  Attributes:
    axes: mesh axes with more than one device that it is cut over; empty where a piece is the whole.
    piece_shape: of a piece.
  """

  @property
  def axes(self) -> tuple[str, ...]: ...

  @property
  def piece_shape(self) -> tuple[int, ...]: ...

  def read(self, array: jax.Array) -> jax.Array:
    """The piece in this device's part of an array."""

  def merged(self, array: jax.Array, piece: jax.Array) -> jax.Array:
    """The piece in the array's dtype, with what lies beside the variable as it is there."""

  def write(self, array: jax.Array, piece: jax.Array) -> jax.Array:
    """The array with a piece of `merged` in it."""

  def gather(self, piece: jax.Array) -> jax.Array:
    """The whole variable, on every device along `axes`."""

  def cut(self, whole: jax.Array) -> jax.Array:
    """This device's piece of the whole variable."""

  def masked(self, piece: jax.Array, other: Any) -> jax.Array:
    """The piece with `other` in place of what is not the variable's."""


@dataclasses.dataclass(frozen=True)
class BlockCut:
  """A variable whose dims are cut, in a row of an array or as an array.

  Attributes:
    shape: of the whole variable.
    spec: its partition spec, an entry for every dim.
    row: its row on this device, int32 []; None for an array without rows.
  """

  shape: tuple[int, ...]
  spec: Spec
  row: Any

  @property
  def axes(self) -> tuple[str, ...]:
    names = [name for entry in self.spec for name in axes_of_entry(entry)]
    return tuple(name for name in names if axis.size(name) > 1)

  @property
  def piece_shape(self) -> tuple[int, ...]:
    pieces = (axis.size(axes_of_entry(entry)) for entry in self.spec)
    return tuple(n // count for n, count in zip(self.shape, pieces, strict=True))

  def read(self, array: jax.Array) -> jax.Array:
    if self.row is None:
      return array
    return lax.dynamic_index_in_dim(array, self.row, 0, keepdims=False)

  def merged(self, array: jax.Array, piece: jax.Array) -> jax.Array:
    return piece.astype(array.dtype)

  def write(self, array: jax.Array, piece: jax.Array) -> jax.Array:
    if self.row is None:
      return piece
    return lax.dynamic_update_index_in_dim(array, piece, self.row, 0)

  def gather(self, piece: jax.Array) -> jax.Array:
    for dim, entry in enumerate(self.spec):
      piece = axis.gather(piece, axes_of_entry(entry), dim)
    return piece

  def cut(self, whole: jax.Array) -> jax.Array:
    return own_pieces(self.spec, whole)

  def masked(self, piece: jax.Array, other: Any) -> jax.Array:
    return piece


@dataclasses.dataclass(frozen=True)
class SpanCut:
  """A variable that lies in a stretch of a packed row, which is cut over some axes or whole.

  Attributes:
    shape: of the whole variable.
    spec: partition spec of the row's dim.
    width: elements of the row that a device holds.
    row: its row on this device, int32 [].
    offset: element of the whole row at which it begins, int32 [].
  """

  shape: tuple[int, ...]
  spec: Spec
  width: int
  row: Any
  offset: Any

  @property
  def axes(self) -> tuple[str, ...]:
    return tuple(name for name in axes_of_entry(self.spec[0]) if axis.size(name) > 1)

  @property
  def size(self) -> int:
    """Number of elements of the variable."""
    return math.prod(self.shape)

  @property
  def piece_shape(self) -> tuple[int, ...]:
    return (min(self.size, self.width),) if self.axes else self.shape

  def _begin(self) -> tuple[Any, Any]:
    """Where the window begins: element of this device's part, and of the variable."""
    if not self.axes:
      return self.offset, 0
    base = axis.index(self.axes) * self.width
    begin = jnp.clip(self.offset - base, 0, self.width - self.piece_shape[0])
    return begin, base + begin - self.offset

  def read(self, array: jax.Array) -> jax.Array:
    size = math.prod(self.piece_shape)
    window = lax.dynamic_slice(array, (self.row, self._begin()[0]), (1, size))
    return window.reshape(self.piece_shape)

  def merged(self, array: jax.Array, piece: jax.Array) -> jax.Array:
    piece = piece.astype(array.dtype)
    return jnp.where(self._own(), piece, self.read(array)) if self.axes else piece

  def write(self, array: jax.Array, piece: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(array, piece.reshape(1, -1), (self.row, self._begin()[0]))

  def _own(self) -> jax.Array:
    """Which elements of a window are the variable's, bool [window]."""
    at = self._begin()[1] + lax.iota(jnp.int32, self.piece_shape[0])
    return (at >= 0) & (at < self.size)

  def masked(self, piece: jax.Array, other: Any) -> jax.Array:
    return jnp.where(self._own(), piece, jnp.asarray(other, piece.dtype)) if self.axes else piece

  def gather(self, piece: jax.Array) -> jax.Array:
    if not self.axes:
      return piece
    # Every element is one device's: the sum adds zeros to it.
    wide = self.masked(piece, 0)
    wide = wide.astype(jnp.int32) if wide.dtype == jnp.bool else wide
    padded = jnp.pad(wide, self.size)
    own = lax.dynamic_slice(padded, (self.size - self._begin()[1],), (self.size,))
    return lax.psum(own, self.axes).astype(piece.dtype).reshape(self.shape)

  def cut(self, whole: jax.Array) -> jax.Array:
    if not self.axes:
      return whole
    window = self.piece_shape[0]
    padded = jnp.pad(whole.reshape(-1), window)
    return lax.dynamic_slice(padded, (window + self._begin()[1],), (window,))


def reduced(name: str, piece: jax.Array, cut: Cut) -> jax.Array:
  """A reduction over all elements of a variable, of which this device has a piece.

  Args:
    name: of the primitive, one of `is_reduction`.
    piece: this device's.
    cut: how the variable is cut.
  """
  local, over_devices, identity = _REDUCTIONS[name]
  out = local(looped(name, cut.masked(piece, identity(piece.dtype))))
  wide = out.astype(jnp.int32) if out.dtype == jnp.bool else out
  total = over_devices(wide, cut.axes) if cut.axes else wide
  return total.astype(piece.dtype)


def looped(name: str, operand: jax.Array) -> jax.Array:
  """The operand of a reduction, written so that XLA reduces it in a loop of its own.

  On CPU, XLA hands plain reductions to a library, which takes its operands as whole arrays. A loop
  reads what it needs. With a selection in it, true but not known to be, a reduction is one.

  Args:
    name: of the primitive, one of `is_reduction`.
    operand: of any shape.
  """
  other = _REDUCTIONS[name][2](operand.dtype)
  true = jnp.asarray(axis.index(STAGE)) >= 0
  return jnp.where(true, operand, jnp.asarray(other, operand.dtype))


def is_reduction(name: str) -> bool:
  """Whether a primitive is a reduction that `reduced` knows."""
  return name in _REDUCTIONS


def _least(dtype: Any) -> Any:
  return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _greatest(dtype: Any) -> Any:
  return jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max
