"""Where unlike stages leave what an action makes for a later one.

What the actions of one stage leave differs from stage to stage in number and size. All that one
action leaves, of one dtype and read by one other action last, is a *record*: values end to end, so
wide as this stage needs. Records lie in *arenas*, one for each action that makes them and each
dtype. A device's stages have parts of their own there, each with as many slots as the schedule ever
fills at once; an arena is as long as the device with the longest needs it:

    device 0   |record|record|record|record|                     stage 0: narrow, 4 in flight
    device 1   |    record    |    record    |    record    |    stage 1: wide, 3 in flight

No action reads an arena that it writes, which XLA would copy whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.parallel.flat import ROW, round_up
from jaxpipe.pipeline.layer.slices import Saved
from jaxpipe.pipeline.table.program import Program, find
from jaxpipe.pipeline.table.slots import Stay, colour
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]
Pools = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Span:
  """Where one saved value lies: its record, and the row of the record at which it begins."""

  record: int
  row: int


@dataclasses.dataclass(frozen=True)
class Arenas:
  """How the records of all stages lie.

  Attributes:
    records: (made, last, dtype) of every kind of record: the columns of the table of cells.
    pools: (made, dtype) of every arena, an array [rows, ROW].
    places: for each stage, number of a saved value -> its place.
    rows: for each stage, record -> rows.
    saved: for each stage, its saved values.
  """

  records: tuple[tuple[Kind, Kind, str], ...]
  pools: tuple[tuple[Kind, str], ...]
  places: tuple[Mapping[int, Span], ...]
  rows: tuple[Mapping[int, int], ...]
  saved: tuple[Sequence[Saved], ...]

  @classmethod
  def of(cls, stages: Sequence[Sequence[Saved]]) -> Arenas:
    """Lays out what each stage's actions leave."""
    records: dict[tuple[Kind, Kind, str], int] = {}
    places, rows = [], []
    for saved in stages:
      mine: dict[int, int] = {}
      at: dict[int, Span] = {}
      for n, value in enumerate(saved):
        r = records.setdefault((value.made, value.last, str(value.dtype)), len(records))
        at[n] = Span(r, mine.get(r, 0))
        mine[r] = mine.get(r, 0) + _rows(value.shape)
      places.append(at)
      rows.append(mine)
    pools = tuple(dict.fromkeys((made, dtype) for made, _, dtype in records))
    return cls(tuple(records), pools, tuple(places), tuple(rows), tuple(map(tuple, stages)))

  @property
  def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One row of each arena."""
    return tuple(jax.ShapeDtypeStruct((ROW,), jnp.dtype(dtype)) for _, dtype in self.pools)

  def pools_of(self, kind: Kind) -> list[int]:
    """The arenas that an action of this kind writes to."""
    return [p for p, (made, _) in enumerate(self.pools) if made is kind]

  def pool(self, record: int) -> int:
    """The arena in which a record lies."""
    made, _, dtype = self.records[record]
    return self.pools.index((made, dtype))

  def bytes_of(self, s: int, *, made: Kind | None = None, last: Kind | None = None) -> int:
    """Bytes, without padding, of what one microbatch leaves at a stage, of these actions."""
    return sum(
      math.prod(value.shape) * jnp.dtype(value.dtype).itemsize
      for value in self.saved[s]
      if made in (None, value.made) and last in (None, value.last)
    )

  def cells(self, program: Program) -> tuple[np.ndarray, np.ndarray]:
    """Gives every record of every stage and microbatch its rows.

    Returns:
      int32 [ticks, P, records], the row at which each begins; and how many rows of each arena each
      device uses, int [P, arenas].
    """
    stays = list(self._stays(program))
    slot, _ = colour(stays, [stay.buffer for stay in stays])
    slots: dict[tuple[int, str], int] = {}
    for stay in stays:
      number = slot[stay.buffer, stay.device, stay.what]
      slots[stay.device, stay.buffer] = max(slots.get((stay.device, stay.buffer), 0), number + 1)
    base: dict[tuple[int, str], int] = {}
    lengths = np.zeros((program.schedule.devices, len(self.pools)), np.int64)
    for (d, name), count in sorted(slots.items()):
      s, r = _parsed(name)
      base[d, name] = lengths[d, self.pool(r)]
      lengths[d, self.pool(r)] += count * self.rows[s][r]
    table = np.zeros((program.ticks, program.schedule.devices, len(self.records)), np.int32)
    for action, (d, tick) in program.at.items():
      for r, rows in self.rows[action.stage].items():
        name = f"{action.stage}/{r}"
        at = (name, d, (action.microbatch,))
        if at in slot:
          table[tick, d, r] = base[d, name] + slot[at] * rows
    return table, lengths

  def _stays(self, program: Program) -> Iterator[Stay]:
    for action, (d, tick) in program.at.items():
      for r in self.rows[action.stage]:
        made, last, _ = self.records[r]
        end = find(program.at, last, action.stage, action.microbatch)
        if made is action.kind and end is not None:
          yield Stay(f"{action.stage}/{r}", d, tick, end[1], (action.microbatch,))

  def read(self, s: int, numbers: Sequence[int], pools: Pools, cells: Any) -> Leaves:
    """A stage's saved values of these numbers."""
    return [self._read(s, n, pools, cells) for n in numbers]

  def _read(self, s: int, n: int, pools: Pools, cells: Any) -> jax.Array:
    place, shape = self.places[s][n], self.saved[s][n].shape
    pool = pools[self.pool(place.record)]
    start = [cells[place.record] + place.row, jnp.int32(0)]
    rows = lax.dynamic_slice(pool, start, (_rows(shape), ROW))
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)

  def write(
    self, s: int, numbers: Sequence[int], values: Sequence[jax.Array], pools: Pools, cells: Any
  ) -> Pools:
    """The arenas with a stage's saved values of these numbers."""
    pools = list(pools)
    for n, value in zip(numbers, values, strict=True):
      place = self.places[s][n]
      p, size = self.pool(place.record), value.size
      flat = jnp.pad(value.reshape(-1), (0, round_up(size, ROW) - size))
      start = [cells[place.record] + place.row, jnp.int32(0)]
      pools[p] = lax.dynamic_update_slice(pools[p], flat.reshape(-1, ROW), start)
    return pools


def _rows(shape: Sequence[int]) -> int:
  return -(-math.prod(shape) // ROW)


def _parsed(name: str) -> tuple[int, int]:
  s, _, r = name.partition("/")
  return int(s), int(r)
