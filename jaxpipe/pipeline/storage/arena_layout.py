"""The pools of stages that are not alike: arenas of saved values, then sums of model state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.storage.arenas import Arenas
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.schedules import Kind


@dataclasses.dataclass(frozen=True)
class ArenaLayout:
  """Which of a packed stack's pools is which: the counterpart of `PoolLayout`.

  Attributes:
    arenas: where saved values lie, in the first pools.
    sums: dtypes of the model state that a forward changes. For each a pool follows, [V, width], in
      which F sums over microbatches what it makes of that state.
    widths: dtype -> elements of a row of those sums.
  """

  arenas: Arenas
  sums: tuple[str, ...]
  widths: Mapping[str, int]

  @property
  def pools(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape and dtype of one row of each pool."""
    counts = (jax.ShapeDtypeStruct((self.widths[n],), wide(jnp.dtype(n))) for n in self.sums)
    return (*self.arenas.shapes, *counts)

  def pools_of(self, kind: Kind) -> list[int]:
    """Numbers of the pools that an action of this kind writes to; only F changes model state."""
    n = len(self.arenas.pools)
    counts = range(n, n + len(self.sums)) if kind is Kind.F else ()
    return [*self.arenas.pools_of(kind), *counts]

  def sum_of(self, dtype: str) -> int:
    """Number of the pool that sums model state of this dtype."""
    return len(self.arenas.pools) + self.sums.index(dtype)
