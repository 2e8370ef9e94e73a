"""Leaves of any shapes laid end to end, one buffer for each dtype.

Stages of unlike layers have parameters, inputs and outputs of unlike shapes; one SPMD program wants
arrays of one shape. Each stage lays its own leaves out in buffers as wide as the widest stage's.
Where a leaf begins is known when the program is traced, so that reading one is a slice.
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
Buffers = Mapping[str, jax.Array]

# Elements at whose multiples a leaf begins: a TPU's tile, and its row for what is smaller than one.
TILE, ROW = 1024, 128


@dataclasses.dataclass(frozen=True)
class Flat:
  """Where each leaf of a tree lies.

  Attributes:
    structure: of the tree.
    leaves: their shapes and dtypes.
    offsets: where each begins in its dtype's buffer, in elements.
    used: dtype -> elements of all leaves.
    widths: dtype -> elements of the buffer, a multiple of `ROW`.
  """

  structure: Any
  leaves: tuple[jax.ShapeDtypeStruct, ...]
  offsets: tuple[int, ...]
  used: Mapping[str, int]
  widths: Mapping[str, int]

  @classmethod
  def of(cls, tree: Tree) -> Flat:
    """Lays out a tree of arrays or shapes: large leaves first, so that small ones share tiles."""
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
    """The leaves as buffers of the given widths, zero where no leaf lies.

    Args:
      tree: arrays of the tree's shapes; their dtypes may be wider than its own.
      widths: name of a dtype -> elements; these dtypes, all of which the result has.
    """
    return self.pack_leaves(jax.tree.leaves(tree), widths)

  def pack_leaves(self, leaves: Sequence[Any], widths: Mapping[str, int]) -> dict[str, jax.Array]:
    """The same of its leaves; those of other dtypes are not read."""
    return {name: self._joined(name, leaves, width) for name, width in widths.items()}

  def _joined(self, name: str, given: Sequence[Any], width: int) -> jax.Array:
    mine = [i for i, leaf in enumerate(self.leaves) if str(leaf.dtype) == name]
    dtype = given[mine[0]].dtype if mine else jnp.dtype(name)
    parts, at = [], 0
    for i in sorted(mine, key=lambda i: self.offsets[i]):
      parts += [jnp.zeros(self.offsets[i] - at, dtype), given[i].reshape(-1)]
      at = self.offsets[i] + self.leaves[i].size
    parts.append(jnp.zeros(width - at, dtype))
    return jnp.concatenate([part for part in parts if part.size] or [jnp.zeros(0, dtype)])

  def unpack(self, buffers: Buffers, *index: Any) -> Tree:
    """The tree, from buffers [*index, width]."""
    return jax.tree.unflatten(self.structure, self.read(buffers, *index))

  def read(self, buffers: Buffers, *index: Any) -> list[jax.Array]:
    """The leaves, from buffers [*index, width]."""
    return [
      read_span(buffers[str(leaf.dtype)], leaf.shape, offset, *index)
      for leaf, offset in zip(self.leaves, self.offsets, strict=True)
    ]


def read_span(buffer: jax.Array, shape: Sequence[int], offset: Any, *index: Any) -> jax.Array:
  """The array of this shape that begins at `offset` of `buffer[*index]`."""
  size = math.prod(shape)
  starts = _starts(index, offset)
  return lax.dynamic_slice(buffer, starts, (*(1 for _ in index), size)).reshape(tuple(shape))


def write_span(buffer: jax.Array, value: jax.Array, offset: Any, *index: Any) -> jax.Array:
  """`buffer` with an array written there, in place where XLA can."""
  flat = value.astype(buffer.dtype).reshape(*(1 for _ in index), -1)
  return lax.dynamic_update_slice(buffer, flat, _starts(index, offset))


def _starts(index: Sequence[Any], offset: Any) -> list[jax.Array]:
  return [jnp.asarray(i, jnp.int32) for i in (*index, offset)]


def widest(flats: Iterable[Flat]) -> dict[str, int]:
  """Widths of buffers that hold any of them."""
  widths: dict[str, int] = {}
  for flat in flats:
    for name, width in flat.widths.items():
      widths[name] = max(widths.get(name, 0), width)
  return dict(sorted(widths.items()))


def round_up(n: int, unit: int) -> int:
  """The least multiple of `unit` that is not below `n`."""
  return -(-n // unit) * unit
