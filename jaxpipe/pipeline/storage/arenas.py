"""Where unlike stages leave what an action makes for a later one.

What the actions of one stage leave differs from stage to stage in number and size, so that values
cannot share cells of one shape (`pools.py`). All that one action of a stage leaves, of one dtype
and read last by one other action, is a *record*: the values laid end to end, as wide as the stage
needs: such as all float32 values of stage 2 that F makes and W reads last. Records lie in *arenas*,
arrays `[rows, ROW]`: one arena for each kind of action that makes records and each dtype. Each
stage of a device has a region of the arena, with as many slots for its records as the schedule ever
fills at once. All devices run one program, so an arena is as long as the device with the longest
regions needs:

    device 0   |record|record|record|record|                     stage 0: narrow, 4 in flight
    device 1   |    record    |    record    |    record    |    stage 1: wide, 3 in flight

No action reads an arena that it writes, which XLA would copy whole: records of F, R and I lie in
arenas of their own, and an action reads only what others have made.
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
from jaxpipe.pipeline.table.slots import LiveRange, colour
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]
Pools = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Span:
  """Where one saved value of a stage lies within its record.

  Attributes:
    record: the record's number, an index into `Arenas.records`.
    row: the row of the record at which the value begins; each value begins a row.
  """

  record: int
  row: int


@dataclasses.dataclass(frozen=True)
class Arenas:
  """How the records of all stages are made up, and which arena each lies in.

  Attributes:
    records: (made, last, dtype) of every kind of record: the action that makes it, the last that
      reads it, and the dtype of its values. The columns of the table of cells.
    pools: (made, dtype) of every arena.
    spans: for each stage, number of a saved value (`LayerSplit.saved`) -> its span.
    rows: for each stage, number of a record -> its rows of `ROW` elements. A record that the stage
      does not have is not in it.
    saved: for each stage, its saved values.
  """

  records: tuple[tuple[Kind, Kind, str], ...]
  pools: tuple[tuple[Kind, str], ...]
  spans: tuple[Mapping[int, Span], ...]
  rows: tuple[Mapping[int, int], ...]
  saved: tuple[Sequence[Saved], ...]

  @classmethod
  def of(cls, stages: Sequence[Sequence[Saved]]) -> Arenas:
    """Lays out what the actions of each stage leave.

    Args:
      stages: for each stage, the saved values of its split.
    """
    records: dict[tuple[Kind, Kind, str], int] = {}
    spans, rows = [], []
    for saved in stages:
      used: dict[int, int] = {}  # rows of each record so far
      at: dict[int, Span] = {}
      for n, value in enumerate(saved):
        r = records.setdefault((value.made, value.last, str(value.dtype)), len(records))
        at[n] = Span(r, used.get(r, 0))
        used[r] = used.get(r, 0) + _rows(value.shape)
      spans.append(at)
      rows.append(used)
    pools = tuple(dict.fromkeys((made, dtype) for made, _, dtype in records))
    return cls(tuple(records), pools, tuple(spans), tuple(rows), tuple(map(tuple, stages)))

  @property
  def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape `[ROW]` and dtype of one row of each arena."""
    return tuple(jax.ShapeDtypeStruct((ROW,), jnp.dtype(dtype)) for _, dtype in self.pools)

  def pools_of(self, kind: Kind) -> list[int]:
    """Returns the numbers of the arenas that an action of this kind writes to, ascending."""
    return [p for p, (made, _) in enumerate(self.pools) if made is kind]

  def pool(self, record: int) -> int:
    """Returns the number of the arena in which a record lies."""
    made, _, dtype = self.records[record]
    return self.pools.index((made, dtype))

  def bytes_of(self, s: int, *, made: Kind | None = None, last: Kind | None = None) -> int:
    """Returns the bytes, without padding, that one microbatch leaves at a stage.

    Args:
      s: the stage.
      made: count only what this action leaves; None for any.
      last: count only what this action is the last to read; None for any.
    """
    return sum(
      math.prod(value.shape) * jnp.dtype(value.dtype).itemsize
      for value in self.saved[s]
      if made in (None, value.made) and last in (None, value.last)
    )

  def cells(self, program: Program) -> tuple[np.ndarray, np.ndarray]:
    """Gives every record of every stage and microbatch its rows of an arena.

    [1] Records of one stage and kind have one width, so that they can be coloured like slots.
    [2] The slots of a stage and record are one region; a device's regions follow one another.
    [3] A record begins at its region's first row, plus its slot times its width.

    Args:
      program: the tick table.

    Returns:
      int32 [ticks, P, records], the row at which each record of the tick's action begins, 0 where
      it has none; and int64 [P, arenas], the rows of each arena that each device uses.
    """
    ranges = list(self._live_ranges(program))
    slot = colour(ranges, [one.buffer for one in ranges]).number  # [1]
    slots: dict[tuple[int, str], int] = {}
    for one in ranges:
      number = slot[one.buffer, one.device, one.value]
      slots[one.device, one.buffer] = max(slots.get((one.device, one.buffer), 0), number + 1)
    base: dict[tuple[int, str], int] = {}
    lengths = np.zeros((program.schedule.devices, len(self.pools)), np.int64)
    for (d, name), count in sorted(slots.items()):  # [2]
      s, r = _parsed(name)
      base[d, name] = lengths[d, self.pool(r)]
      lengths[d, self.pool(r)] += count * self.rows[s][r]
    table = np.zeros((program.ticks, program.schedule.devices, len(self.records)), np.int32)
    for action, (d, tick) in program.at.items():  # [3]
      for r, rows in self.rows[action.stage].items():
        name = f"{action.stage}/{r}"
        at = (name, d, (action.microbatch,))
        # A schedule may never make a record: its forwards alone leave nothing.
        if at in slot:
          table[tick, d, r] = base[d, name] + slot[at] * rows
    return table, lengths

  def _live_ranges(self, program: Program) -> Iterator[LiveRange]:
    """Yields the live range of every record, of a buffer named `stage/record`."""
    for action, (d, tick) in program.at.items():
      for r in self.rows[action.stage]:
        made, last, _ = self.records[r]
        end = find(program.at, last, action.stage, action.microbatch)
        if made is action.kind and end is not None:
          yield LiveRange(f"{action.stage}/{r}", d, tick, end[1], (action.microbatch,))

  def read(self, s: int, numbers: Sequence[int], pools: Pools, cells: Any) -> Leaves:
    """Reads saved values of a stage.

    Args:
      s: the stage.
      numbers: which values, by their numbers in the stage's split.
      pools: the arenas, `[rows, ROW]` each.
      cells: int32 [records], rows at which the records of this stage and microbatch begin.

    Returns:
      The values, each of its own shape, in the order of `numbers`.
    """
    return [self._read(s, n, pools, cells) for n in numbers]

  def _read(self, s: int, n: int, pools: Pools, cells: Any) -> jax.Array:
    """Reads one saved value."""
    span, shape = self.spans[s][n], self.saved[s][n].shape
    pool = pools[self.pool(span.record)]
    start = [cells[span.record] + span.row, jnp.int32(0)]
    rows = lax.dynamic_slice(pool, start, (_rows(shape), ROW))
    # The last row is padded.
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)

  def write(
    self, s: int, numbers: Sequence[int], values: Sequence[jax.Array], pools: Pools, cells: Any
  ) -> Pools:
    """Returns the arenas with these saved values of a stage written.

    Args:
      s: the stage.
      numbers: which values, by their numbers in the stage's split.
      values: the values, each of its own shape.
      pools: the arenas.
      cells: rows at which the records of this stage and microbatch begin.
    """
    pools = list(pools)
    for n, value in zip(numbers, values, strict=True):
      span = self.spans[s][n]
      p, size = self.pool(span.record), value.size
      # Padded to whole rows, the unit by which arenas are addressed.
      flat = jnp.pad(value.reshape(-1), (0, round_up(size, ROW) - size))
      start = [cells[span.record] + span.row, jnp.int32(0)]
      pools[p] = lax.dynamic_update_slice(pools[p], flat.reshape(-1, ROW), start)
    return pools


def _rows(shape: Sequence[int]) -> int:
  """Returns the rows that a value of this shape takes."""
  return -(-math.prod(shape) // ROW)


def _parsed(name: str) -> tuple[int, int]:
  """Returns stage and record of a buffer's name."""
  s, _, r = name.partition("/")
  return int(s), int(r)
