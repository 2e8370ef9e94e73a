"""Where the saved values of layers lie between the action that makes them and the last reader.

Values of equal shape and dtype share a *pool*, an array of *cells* `[cells, layers, *shape]`. Each
value of each stage and microbatch has a cell of its own for as long as it waits, which the tick
table names (`Program.cells`, by interval colouring). Cells are not bound to a kind of value: those
that I frees by reading them for the last time take what I leaves for W, so that the memory of a
split backward is not the sum of what I and what W read.

    pool [5, 4] float32   cell 0  x of stage 0, microbatch 3      made by F, last read by W
                          cell 1  dy of stage 0, microbatch 2     made by I, last read by W
    pool [5, 6] float32   cell 0  tanh h of stage 0, microbatch 3

Every saved value of layers that are alike passes `Storage.write` on its way in and `Storage.read`
on its way out. Those of stages that are not alike pass `Arenas.write` and `Arenas.read`
(`arenas.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.slices import Saved
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Index
from jaxpipe.pipeline.table.program import Value
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]
Pools = list[jax.Array]


class SavedLayout(Protocol):
  """Which arrays hold the saved values of a stage, whichever way they lie in them.

  `PoolLayout` is the layout of layers that are alike, `ArenaLayout` that of unlike stages.
  """

  @property
  def pools(self) -> Sequence[jax.ShapeDtypeStruct]:
    """Shape and dtype of one cell of each pool; the last ones are those of `sums`."""

  @property
  def sums(self) -> Sequence[Any]:
    """One entry for each pool in which F sums what it makes of the model state."""

  def pools_of(self, kind: Kind) -> list[int]:
    """Returns the numbers of the pools that an action of this kind writes to, ascending."""


@dataclasses.dataclass(frozen=True)
class PoolLayout:
  """Which saved value lies in which pool.

  Attributes:
    values: the saved values that lie in pools, in the order of the tick table's cells.
    position: number of a saved value (`LayerSplit.saved`) -> its index in `values`. Values that
      live inside one action only are not in it.
    cells: shape `[layers, *shape]` and dtype of one cell of each pool of saved values.
    sums: shape and dtype of a layer's model state that a forward changes, a leaf each. For each a
      pool follows, with one cell for every layer of the device, in which F sums over microbatches
      what it makes of that leaf.
  """

  values: tuple[Value, ...]
  position: Mapping[int, int]
  cells: tuple[jax.ShapeDtypeStruct, ...]
  sums: tuple[jax.ShapeDtypeStruct, ...] = ()

  @property
  def pools(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape and dtype of one cell of each pool."""
    return (*self.cells, *(jax.ShapeDtypeStruct(s.shape, rings.wide(s.dtype)) for s in self.sums))

  @classmethod
  def of(
    cls, saved: Mapping[int, Saved], layers: int, sums: Sequence[jax.ShapeDtypeStruct] = ()
  ) -> PoolLayout:
    """Gives each shape and dtype of value a pool.

    Args:
      saved: number -> saved value of one layer, of all the values that are to lie here.
      layers: layers of a stage; a cell holds a value of each.
      sums: shapes and dtypes of the model state that a layer's forward changes.
    """
    pools: dict[tuple[Any, ...], int] = {}  # numbered as their sizes are first met
    values = []
    for value in saved.values():
      size = ((layers, *value.shape), value.dtype)
      values.append(Value(pools.setdefault(size, len(pools)), value.made, value.last))
    return cls(
      tuple(values),
      {number: i for i, number in enumerate(saved)},
      tuple(jax.ShapeDtypeStruct(*size) for size in pools),
      tuple(sums),
    )

  def pools_of(self, kind: Kind) -> list[int]:
    """Returns the numbers of the pools that an action of this kind writes to, ascending."""
    sums = range(len(self.cells), len(self.pools)) if kind is Kind.F else ()
    return [*sorted({value.pool for value in self.values if value.made is kind}), *sums]

  def one_each_bytes(self) -> int:
    """Returns the bytes of pools in which every value has a cell of its own."""
    cells = (self.cells[value.pool] for value in self.values)
    return sum(math.prod(cell.shape) * cell.dtype.itemsize for cell in cells)

  def one_each(self) -> tuple[list[int], list[int]]:
    """Lays the values of one microbatch out, for pools that live inside a single action.

    Returns:
      The cell of each value within its pool, in the order of `values`; and each pool's length.
    """
    lengths = [0] * len(self.cells)
    cells = []
    for value in self.values:
      cells.append(lengths[value.pool])
      lengths[value.pool] += 1
    return cells, lengths


@dataclasses.dataclass(frozen=True)
class Storage:
  """The pools as one action sees them: with the cells of its own stage and microbatch.

  It is a value: `write` and `take` return another one. `read`, `write` and `take` are for a
  `PoolLayout`; unlike stages read and write `pools` and `cells` by their arenas.

  Attributes:
    layout: which value lies in which pool.
    pools: the arrays, `[cells, layers, *shape]` each.
    cells: the cell of each value within its pool, in the order of `layout.values`: a row of the
      tick table, int32 [values], or the list that `PoolLayout.one_each` returns. Of unlike stages,
      rows of arenas, int32 [records].
  """

  layout: SavedLayout
  pools: Pools
  cells: jax.Array | Sequence[int]

  def read(self, numbers: Sequence[int], layer: Index) -> Leaves:
    """Reads saved values of one layer.

    Args:
      numbers: which values, by their numbers in the layer's split.
      layer: which layer of the stage.

    Returns:
      Their arrays, of the shapes that one layer saves, in the order of `numbers`.
    """
    layout = self._pool_layout
    places = [layout.position[n] for n in numbers]
    return [rings.load(self.pools[layout.values[i].pool], self.cells[i], layer) for i in places]

  def write(self, numbers: Sequence[int], layer: Index, values: Sequence[jax.Array]) -> Storage:
    """Returns a storage that also holds these saved values of one layer.

    Args:
      numbers: which values, by their numbers in the layer's split.
      layer: which layer of the stage.
      values: their arrays.
    """
    layout, pools = self._pool_layout, list(self.pools)
    for n, value in zip(numbers, values, strict=True):
      i = layout.position[n]
      pool = layout.values[i].pool
      pools[pool] = rings.store(pools[pool], value, self.cells[i], layer)
    return dataclasses.replace(self, pools=pools)

  def count(self, new: Sequence[jax.Array], layer: Index) -> Storage:
    """Returns a storage that counts what a forward has made of a layer's model state.

    Args:
      new: the leaves that it changes, of floats added to the sums; of whole numbers the largest is
        kept.
      layer: which layer of the device.
    """
    layout, pools = self._pool_layout, list(self.pools)
    for p, leaf in enumerate(new, len(layout.cells)):
      old = rings.get(pools[p], layer)
      leaf = leaf.astype(old.dtype)
      pools[p] = rings.put(pools[p], old + leaf if is_float(old) else jnp.maximum(old, leaf), layer)
    return dataclasses.replace(self, pools=pools)

  def take(self, other: Storage) -> Storage:
    """Returns a storage that holds every value that both have as `other` holds it, all layers.

    It moves what an action has left in scratch of its own to the pools, or fetches what it will
    read from the pools into scratch.
    """
    ours, theirs, pools = self._pool_layout, other._pool_layout, list(self.pools)
    # Sorted, for a set has no order and the traced program should have one.
    for n in sorted(ours.position.keys() & theirs.position.keys()):
      to, source = ours.position[n], theirs.position[n]
      value = rings.get(other.pools[theirs.values[source].pool], other.cells[source])
      pool = ours.values[to].pool
      pools[pool] = rings.put(pools[pool], value, self.cells[to])
    return dataclasses.replace(self, pools=pools)

  @property
  def _pool_layout(self) -> PoolLayout:
    """The layout, of a storage for layers that are alike."""
    # Another layout here would be a mistake of ours: unlike stages never call what asks for it.
    assert isinstance(self.layout, PoolLayout)
    return self.layout
