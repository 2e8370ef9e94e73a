"""What each device sends in one step, by mesh axes.

The compiled program says what an action exchanges, and the schedule how often a device does it:
this is the product.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.placing import check_mesh
from jaxpipe.pipeline.compiled.action_paths import once_each, runs
from jaxpipe.pipeline.compiled.collectives import PERMUTE, Collective, collectives
from jaxpipe.pipeline.compiled.hlo import Module, parse
from jaxpipe.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """The collectives of one kind, over the same axes, of one action.

  Attributes:
    axes, kind, group: as of each `Collective`.
    path: the action, as of its `ActionSite`; empty for what belongs to none.
    arrays: how many each run of the action exchanges.
    bytes: that a device sends in one run.
    runs: in one step, of each device along `stage`.
  """

  axes: tuple[str, ...]
  kind: str
  group: int
  path: tuple[str, ...]
  arrays: int
  bytes: float
  runs: tuple[int, ...]

  @property
  def step_bytes(self) -> tuple[float, ...]:
    """Bytes that a device sends in one step, by its place along `stage`."""
    return tuple(self.bytes * count for count in self.runs)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What is sent in one step, as a table.

  Attributes:
    rows: by action, in the order of the text.
  """

  rows: tuple[Row, ...]

  def bytes(self, axes: Sequence[str] | None = None, kind: str | None = None) -> tuple[float, ...]:
    """Bytes that a device sends in one step, by its place along `stage`.

    Args:
      axes: exactly these; None for all.
      kind: None for all.
    """
    mine = [
      row.step_bytes
      for row in self.rows
      if kind in (None, row.kind) and (axes is None or tuple(axes) == row.axes)
    ]
    return tuple(map(sum, zip(*mine, strict=True)))

  def sums(self) -> dict[tuple[tuple[str, ...], str], float]:
    """(axes, kind) -> bytes in one step of the device that sends most."""
    keys = dict.fromkeys((row.axes, row.kind) for row in self.rows)
    return {(axes, kind): max(self.bytes(axes, kind)) for axes, kind in keys}

  def __str__(self) -> str:
    head = ("axes", "kind", "scope", "arrays", "runs", "bytes a run", "MB a step")
    return "\n".join(_aligned([head, *map(_cells, self.rows)]))


def traffic(compiled: Any, mesh: Mesh, schedule: Schedule) -> Traffic:
  """Returns what the devices of a compiled step send in one step.

  What runs in every tick is counted in every tick, whether or not it carries anything. Where ticks
  are written out, the site of an action that sends most counts for all of them.

  Args:
    compiled: what `jax.jit(step).lower(...).compile()` returns, its text, or what `parse` made of
      that.
    mesh, schedule: those of the step.

  Raises:
    ValueError: see `collectives`; a mesh of another size than the schedule's.
  """
  check_mesh(schedule, mesh)
  rows: dict[Any, list[tuple[Collective, tuple[int, ...]]]] = collections.defaultdict(list)
  for one in once_each(collectives(module_of(compiled), mesh), lambda one: one.bytes):
    counts = _runs(one, mesh, schedule)
    # Each tick that is written out sends between other neighbours: together they are one row.
    like = one.bytes if one.kind == PERMUTE else counts
    rows[one.axes, one.kind, one.group, one.place.path, like].append((one, counts))
  return Traffic(tuple(map(_row, rows.values())))


def module_of(compiled: Any) -> Module:
  """The program, of a compiled function, of its text, or of itself."""
  if isinstance(compiled, Module):
    return compiled
  return parse(compiled if isinstance(compiled, str) else compiled.as_text())


def _runs(one: Collective, mesh: Mesh, schedule: Schedule) -> tuple[int, ...]:
  """Runs in one step of the action, or of what belongs to none itself, by device along `stage`."""
  counts = runs(schedule, one.place.path)
  if one.place.path:
    return counts
  sends = set(range(schedule.devices))
  if one.kind == PERMUTE:
    # Not all devices have a neighbour to whom they send.
    places = np.unravel_index(np.array(one.senders), mesh.devices.shape)
    sends = set(places[mesh.axis_names.index(STAGE)].tolist())
  return tuple(one.times * (d in sends) for d in range(len(counts)))


def _row(found: Sequence[tuple[Collective, tuple[int, ...]]]) -> Row:
  """Of collectives of one kind: permutes of one size, or others that run equally often."""
  first, counts = found[0]
  turns = [one.times if one.place.path else 1 for one, _ in found]
  if first.kind == PERMUTE and not first.place.path:
    counts, turns = tuple(map(sum, zip(*(c for _, c in found), strict=True))), [1]
  return Row(
    axes=first.axes,
    kind=first.kind,
    group=first.group,
    path=first.place.path,
    arrays=sum(turns),
    bytes=sum(one.bytes * n for (one, _), n in zip(found, turns, strict=False)),
    runs=counts,
  )


def _cells(row: Row) -> tuple[str, ...]:
  low, high = min(row.runs), max(row.runs)
  return (
    ",".join(row.axes),
    row.kind,
    "/".join(row.path) or "-",
    str(row.arrays),
    str(high) if low == high else f"{low}..{high}",
    f"{row.bytes:,.0f}",
    f"{max(row.step_bytes) / 1e6:,.3f}",
  )


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
  """Words to the left, numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = zip(row, widths, strict=True)
    yield "  ".join(
      f"{c:<{w}}" if i < 3 else f"{c:>{w}}" for i, (c, w) in enumerate(cells)
    ).rstrip()
