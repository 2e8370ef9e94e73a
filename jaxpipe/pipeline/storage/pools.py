"""Where saved values lie between the action that makes them and the last that reads them.

Values of equal shape and dtype share a *pool*, an array of cells [cells, layers, *shape]. Each
value of each stage and microbatch has a cell of its own there, by the tick table. What one action
frees the next one fills, whichever value it is: what W waits for takes the cells of what I
consumed.

`Storage.write` and `Storage.read` are the one place that every saved value passes, on its way in
and out: a format of fewer bits, or another memory, would stand there and in `PoolLayout.pools`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpipe.pipeline.layer.slices import Saved
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Index
from jaxpipe.pipeline.table.program import Value
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]
Pools = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class PoolLayout:
  """Which saved value lies in which pool.

  Attributes:
    values: those that lie in pools, for the tick table.
    position: number of a saved value -> its place in `values`.
    pools: shape and dtype of one cell of each pool.
  """

  values: tuple[Value, ...]
  position: Mapping[int, int]
  pools: tuple[jax.ShapeDtypeStruct, ...]

  @classmethod
  def of(cls, saved: Mapping[int, Saved], layers: int) -> PoolLayout:
    """Gives each size of value a pool.

    Args:
      saved: number -> what one layer's actions leave for one another.
      layers: layers of a stage.
    """
    pools: dict[tuple[Any, ...], int] = {}
    values = []
    for value in saved.values():
      size = ((layers, *value.shape), value.dtype)
      values.append(Value(pools.setdefault(size, len(pools)), value.made, value.last))
    return cls(
      tuple(values),
      {number: i for i, number in enumerate(saved)},
      tuple(jax.ShapeDtypeStruct(*size) for size in pools),
    )

  def pools_of(self, kind: Kind) -> list[int]:
    """The pools that an action of this kind writes to, ascending."""
    return sorted({value.pool for value in self.values if value.made is kind})

  def one_each_bytes(self) -> int:
    """Bytes of pools in which every value has its own cell."""
    cells = (self.pools[value.pool] for value in self.values)
    return sum(math.prod(cell.shape) * cell.dtype.itemsize for cell in cells)

  def one_each(self) -> tuple[list[int], list[int]]:
    """Cells where every value has its own, and how many each pool then has."""
    lengths = [0] * len(self.pools)
    cells = []
    for value in self.values:
      cells.append(lengths[value.pool])
      lengths[value.pool] += 1
    return cells, lengths


@dataclasses.dataclass(frozen=True)
class Storage:
  """The pools, as one action sees them.

  Attributes:
    layout: which value lies in which pool; of unlike stages, one of their own.
    pools: the arrays.
    cells: [values], those of the action's stage and microbatch.
  """

  layout: Any
  pools: Pools
  cells: Any

  def read(self, numbers: Sequence[int], layer: Index) -> Leaves:
    """One layer's saved values of these numbers."""
    places = [self.layout.position[n] for n in numbers]
    return [
      rings.load(self.pools[self.layout.values[i].pool], self.cells[i], layer) for i in places
    ]

  def write(self, numbers: Sequence[int], layer: Index, values: Sequence[jax.Array]) -> Storage:
    """A storage that holds one layer's values of these numbers as well."""
    pools = list(self.pools)
    for n, value in zip(numbers, values, strict=True):
      i = self.layout.position[n]
      pool = self.layout.values[i].pool
      pools[pool] = rings.store(pools[pool], value, self.cells[i], layer)
    return dataclasses.replace(self, pools=pools)

  def take(self, other: Storage) -> Storage:
    """A storage that holds all layers of the values that both have, as another holds them."""
    pools = list(self.pools)
    for n in sorted(self.layout.position.keys() & other.layout.position.keys()):
      mine, theirs = self.layout.position[n], other.layout.position[n]
      value = rings.get(other.pools[other.layout.values[theirs].pool], other.cells[theirs])
      pool = self.layout.values[mine].pool
      pools[pool] = rings.put(pools[pool], value, self.cells[mine])
    return dataclasses.replace(self, pools=pools)
