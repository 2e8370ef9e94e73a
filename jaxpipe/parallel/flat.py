"""Lays the leaves of a tree end to end in one flat buffer for each dtype.

Stages of unlike layers have parameters, inputs and outputs of unlike shapes, and one SPMD program
wants arrays of one shape. Each stage therefore lays its own leaves out in buffers as wide as the
widest stage's. Buffers of parameters are rows of an array [S, width], sharded over `stage`. For two
stages with float32 leaves, offsets in elements:

    row 0   | kernel [40, 30]  | gap | bias [30] | zeros up to the width of the array         |
            0               1200  1280        1310                                         3328

    row 1   | kernel [64, 48]                         | bias [48] | gap | scale [48]  |  gap  |
            0                                      3072        3120  3200          3248    3328

Where a leaf begins is known when the program is traced, so that reading one is a slice and a
reshape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
# Name of a dtype, such as `float32` -> [*dims, width].
Buffers = Mapping[str, jax.Array]

# Elements at whose multiples a leaf begins: a TPU's tile, and its row for what is smaller than one.
TILE, ROW = 1024, 128


@dataclasses.dataclass(frozen=True)
class Flat:
  """Where each leaf of one tree lies in the buffer of its dtype.

  Attributes:
    structure: the tree's structure, as `jax.tree.structure` gives it.
    leaves: shape and dtype of each leaf, in the order of `jax.tree.leaves`.
    offsets: for each leaf, the element of its dtype's buffer at which it begins.
    used: name of a dtype -> elements of all leaves of that dtype, without gaps.
    widths: name of a dtype -> elements of the buffer with its gaps, a multiple of `ROW`.
  """

  structure: Any
  leaves: tuple[jax.ShapeDtypeStruct, ...]
  offsets: tuple[int, ...]
  used: Mapping[str, int]
  widths: Mapping[str, int]

  @classmethod
  def of(cls, tree: Tree) -> Flat:
    """Chooses the offset of every leaf, largest first.

    Leaves of a tile and more begin at multiples of `TILE`; smaller ones follow, at multiples of
    `ROW`, several to a tile.

    Args:
      tree: arrays, or their shapes.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    offsets = [0] * len(shapes)
    used: dict[str, int] = {}
    widths: dict[str, int] = {}
    for i in sorted(range(len(shapes)), key=lambda i: (-shapes[i].size, i)):
      name, size = str(shapes[i].dtype), shapes[i].size
      begin = round_up(widths.get(name, 0), TILE if size >= TILE else ROW)
      offsets[i], widths[name] = begin, round_up(begin + size, ROW)
      used[name] = used.get(name, 0) + size
    return cls(structure, tuple(shapes), tuple(offsets), used, widths)

  def pack(self, tree: Tree, widths: Mapping[str, int]) -> dict[str, jax.Array]:
    """Writes the leaves of a tree into new buffers, zero where no leaf lies.

    Args:
      tree: arrays of this layout's structure and shapes. Their dtypes may be wider than its own, as
        an optimizer's moments are: a buffer keeps the name of the layout's dtype and has the
        leaves' own.
      widths: name of a dtype -> elements of its buffer, no fewer than in `self.widths`. The result
        has these dtypes and no others.

    Returns:
      Name of a dtype -> [width].
    """
    return self.pack_leaves(jax.tree.leaves(tree), widths)

  def pack_leaves(self, leaves: Sequence[Any], widths: Mapping[str, int]) -> dict[str, jax.Array]:
    """Writes leaves into new buffers, given in the order of `self.leaves`.

    Args:
      leaves: one for each of `self.leaves`. Those whose dtype `widths` lacks are not read.
      widths: name of a dtype -> elements of its buffer.

    Returns:
      Name of a dtype -> [width].
    """
    return {name: self._joined(name, leaves, width) for name, width in widths.items()}

  def _joined(self, name: str, given: Sequence[Any], width: int) -> jax.Array:
    """The buffer of one dtype: its leaves in the order of their offsets, zeros between them."""
    members = [i for i, leaf in enumerate(self.leaves) if str(leaf.dtype) == name]
    dtype = given[members[0]].dtype if members else jnp.dtype(name)
    parts, at = [], 0
    for i in sorted(members, key=lambda i: self.offsets[i]):
      parts += [jnp.zeros(self.offsets[i] - at, dtype), given[i].reshape(-1)]
      at = self.offsets[i] + self.leaves[i].size
    parts.append(jnp.zeros(width - at, dtype))
    # Leaves and gaps may have no elements; `concatenate` takes at least one array.
    return jnp.concatenate([part for part in parts if part.size] or [jnp.zeros(0, dtype)])

  def unpack(self, buffers: Buffers, *index: Any) -> Tree:
    """Reads the tree back from buffers.

    Args:
      buffers: name of a dtype -> [*dims, width].
      index: an int or int32 [] for each of the leading dims, such as the number of a row.
    """
    return jax.tree.unflatten(self.structure, self.read(buffers, *index))

  def read(self, buffers: Buffers, *index: Any) -> list[jax.Array]:
    """Reads the leaves back from buffers, in the order of `self.leaves`.

    Args:
      buffers: name of a dtype -> [*dims, width].
      index: an int or int32 [] for each of the leading dims, such as the number of a row.
    """
    return [
      read_span(buffers[str(leaf.dtype)], leaf.shape, offset, *index)
      for leaf, offset in zip(self.leaves, self.offsets, strict=True)
    ]


def read_span(buffer: jax.Array, shape: Sequence[int], offset: Any, *index: Any) -> jax.Array:
  """Reads one array out of a buffer.

  Args:
    buffer: [*dims, width].
    shape: of the array that is read.
    offset: element of the last dim at which it begins, an int or int32 [].
    index: an int or int32 [] for each of the leading dims.

  Returns:
    An array of that shape, in the buffer's dtype.
  """
  size = math.prod(shape)
  starts = _starts(index, offset)
  return lax.dynamic_slice(buffer, starts, (*(1 for _ in index), size)).reshape(tuple(shape))


def write_span(buffer: jax.Array, value: jax.Array, offset: Any, *index: Any) -> jax.Array:
  """Writes one array into a buffer.

  Args:
    buffer: [*dims, width].
    value: array of any shape, cast to the buffer's dtype.
    offset: element of the last dim at which it is to begin, an int or int32 [].
    index: an int or int32 [] for each of the leading dims.

  Returns:
    The buffer with the value in it, updated in place where XLA can.
  """
  flat = value.astype(buffer.dtype).reshape(*(1 for _ in index), -1)
  return lax.dynamic_update_slice(buffer, flat, _starts(index, offset))


def _starts(index: Sequence[Any], offset: Any) -> list[jax.Array]:
  """Start indices of a slice; all of one dtype, which `lax` demands."""
  return [jnp.asarray(i, jnp.int32) for i in (*index, offset)]


def widest(flats: Iterable[Flat]) -> dict[str, int]:
  """Returns widths of buffers that hold any of several layouts: name of a dtype -> elements."""
  widths: dict[str, int] = {}
  for flat in flats:
    for name, width in flat.widths.items():
      widths[name] = max(widths.get(name, 0), width)
  return dict(sorted(widths.items()))


def round_up(n: int, unit: int) -> int:
  """Returns the least multiple of `unit` that is not below `n`."""
  return -(-n // unit) * unit
