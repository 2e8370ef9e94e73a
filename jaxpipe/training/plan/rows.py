"""Decides which rows of a batch a process reads, and makes global arrays of what was read.

Each device along the axes of `ROWS` holds an equal slice of every microbatch. A process reads the
rows of its own devices, once each; peers along the other axes that lie in another process read them
as well, so that no process sends rows to another. With 2 microbatches and 2 data shards:

    rows of the batch    0 1 2 3 | 4 5 6 7     microbatch 0 | microbatch 1
    data shard           0 0 1 1 | 0 0 1 1     a process of shard 1 reads rows 2, 3, 6 and 7

Shapes: B rows of a batch, M microbatches, R rows that this process reads.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpipe.parallel.mesh import row_shards
from jaxpipe.pipeline.batch import Microbatches, check_rows, rows_spec

Tree = Any


class ProcessRows:
  """The rows of every batch that this process reads, and their places on the mesh.

  Args:
    mesh: of the run; some of its devices are this process's.
    batch_size: B.
    microbatches: M.

  Raises:
    ValueError: rows that do not divide, or a mesh without a device of this process.

  Attributes:
    rows: numbers of the rows to read, microbatch by microbatch; R of them.
  """

  def __init__(self, mesh: Mesh, batch_size: int, microbatches: int) -> None:
    one = jax.ShapeDtypeStruct((batch_size,), np.int32)
    self._shape = (microbatches, check_rows({"": one}, microbatches, row_shards(mesh)))
    self._sharding = NamedSharding(mesh, rows_spec(mesh))
    held = self._sharding.addressable_devices_indices_map(self._shape)
    columns = [np.arange(self._shape[1])[index[1]] for index in held.values() if index]
    if not columns:
      raise ValueError(
        f"none of its {mesh.size} devices is of process {jax.process_index()}; let it have all"
        f" {jax.device_count()} devices"
      )
    self._columns = np.unique(np.concatenate(columns))
    starts = np.arange(microbatches)[:, None] * self._shape[1]
    self.rows: list[int] = (starts + self._columns).ravel().tolist()

  def put(self, batch: Tree) -> Microbatches:
    """Makes a batch on the mesh of the rows that each process has read.

    Args:
      batch: leaves [R, ...], the rows numbered in `rows`, in that order.

    Returns:
      Leaves [M, B / M, ...], each device with its own rows.
    """

    def leaf(read: np.ndarray) -> jax.Array:
      own = read.reshape(self._shape[0], len(self._columns), *read.shape[1:])

      def part(index: Any) -> np.ndarray:
        """The rows of one device: `index` are its slices of [M, B / M, ...]."""
        first, last = np.searchsorted(self._columns, index[1].indices(self._shape[1])[:2])
        return own[index[0], first:last]

      shape = (*self._shape, *read.shape[1:])
      return jax.make_array_from_callback(shape, self._sharding, part)

    return Microbatches(jax.tree.map(leaf, batch))

  def shapes(self, batch: Tree) -> Microbatches:
    """Returns the shapes, with shardings, of what `put` makes.

    Args:
      batch: shapes of a whole batch, leaves [B, ...].
    """

    def leaf(whole: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      shape = (*self._shape, *whole.shape[1:])
      return jax.ShapeDtypeStruct(shape, whole.dtype, sharding=self._sharding)

    return Microbatches(jax.tree.map(leaf, batch))
