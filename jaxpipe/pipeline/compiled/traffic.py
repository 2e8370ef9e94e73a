"""Counts the bytes that each device sends in one step, by mesh axes.

The compiled program says what an action exchanges, and the schedule how often a device does the
action. A `Traffic` holds the products of both as a table:

    axes    kind                scope  arrays  runs  bytes a run  MB a step
    stage   collective-permute  -           1  0..5           24      0.000
    tensor  all-reduce          F           3     4           72      0.000
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.placing import check_mesh
from jaxpipe.pipeline.compiled.action_paths import once_each, runs
from jaxpipe.pipeline.compiled.collectives import PERMUTE, Collective, collectives
from jaxpipe.pipeline.compiled.hlo import HloModule, module_of
from jaxpipe.schedules import Schedule

# Columns of the printed table that hold words, and are aligned to the left.
_WORDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """All collectives of one kind, over the same axes, of one action.

  Attributes:
    axes: mesh axes along which the devices of a group differ, the outermost first.
    kind: of the collectives, such as `all-reduce`.
    group: devices in a group.
    path: the action, as in `ActionSite.path`; empty for collectives that belong to no action.
    arrays: number of arrays that each run of the action exchanges.
    bytes: bytes that a device sends in one run.
    runs: number of runs in one step, for each device along `stage`.
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
    """Bytes that a device sends in one step, for each device along `stage`."""
    return tuple(self.bytes * count for count in self.runs)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All that the devices send in one step; printed, it is a table.

  Attributes:
    rows: by action, in the order in which `collectives` finds them.
  """

  rows: tuple[Row, ...]

  def bytes(self, axes: Sequence[str] | None = None, kind: str | None = None) -> tuple[float, ...]:
    """Returns the bytes that a device sends in one step, for each device along `stage`.

    Args:
      axes: counts the collectives over exactly these mesh axes, the outermost first; None for all.
      kind: counts the collectives of this kind, such as `all-gather`; None for all.
    """
    counted = [
      row.step_bytes
      for row in self.rows
      if kind in (None, row.kind) and (axes is None or tuple(axes) == row.axes)
    ]
    return tuple(map(sum, zip(*counted, strict=True)))

  def sums(self) -> dict[tuple[tuple[str, ...], str], float]:
    """Returns (axes, kind) -> bytes that the device which sends most sends in one step."""
    keys = dict.fromkeys((row.axes, row.kind) for row in self.rows)
    return {(axes, kind): max(self.bytes(axes, kind)) for axes, kind in keys}

  def __str__(self) -> str:
    head = ("axes", "kind", "scope", "arrays", "runs", "bytes a run", "MB a step")
    return "\n".join(_aligned([head, *map(_cells, self.rows)]))


def traffic(
  compiled: str | HloModule | jax.stages.Compiled, mesh: Mesh, schedule: Schedule
) -> Traffic:
  """Returns what the devices of a compiled step send in one step.

  A transfer that runs in every tick is counted in every tick, whether or not it carries anything.
  Where ticks are unrolled, the site of an action that sends most counts for all of its sites.

  Args:
    compiled: what `jax.jit(step).lower(...).compile()` returns, its text, or what `parse` made of
      that.
    mesh: that the step was compiled for.
    schedule: that the step runs.

  Raises:
    ValueError: a mesh of another size than the schedule's; and as `collectives` does.
  """
  check_mesh(schedule, mesh)
  rows: dict[Hashable, list[tuple[Collective, tuple[int, ...]]]] = collections.defaultdict(list)
  for one in once_each(collectives(module_of(compiled), mesh), lambda one: one.bytes):
    counts = _runs(one, mesh, schedule)
    # Each unrolled tick has a permute between other neighbours: together those of one size are one
    # row. Other collectives make one row if every device runs them equally often.
    like = one.bytes if one.kind == PERMUTE else counts
    rows[one.axes, one.kind, one.group, one.site.path, like].append((one, counts))
  return Traffic(tuple(map(_row, rows.values())))


def _runs(one: Collective, mesh: Mesh, schedule: Schedule) -> tuple[int, ...]:
  """Runs in one step of the action, or without one of the collective, by device along `stage`."""
  counts = runs(schedule, one.site.path)
  if one.site.path:
    return counts
  sends = set(range(schedule.devices))
  if one.kind == PERMUTE:
    # At the end of a line of stages, or in an unrolled tick, some devices send to nobody.
    places = np.unravel_index(np.array(one.senders), mesh.devices.shape)
    sends = set(places[mesh.axis_names.index(STAGE)].tolist())
  return tuple(one.times * (d in sends) for d in range(len(counts)))


def _row(found: Sequence[tuple[Collective, tuple[int, ...]]]) -> Row:
  """Makes one row of alike collectives, each with its runs in one step.

  A run of an action executes each of its collectives `times` times. Without an action, the runs are
  the executions themselves: permutes of one size are one array whose runs add up.
  """
  first, counts = found[0]
  executions = [one.times if one.site.path else 1 for one, _ in found]
  if first.kind == PERMUTE and not first.site.path:
    counts = tuple(map(sum, zip(*(c for _, c in found), strict=True)))
    found, executions = found[:1], [1]
  return Row(
    axes=first.axes,
    kind=first.kind,
    group=first.group,
    path=first.site.path,
    arrays=sum(executions),
    bytes=sum(one.bytes * n for (one, _), n in zip(found, executions, strict=True)),
    runs=counts,
  )


def _cells(row: Row) -> tuple[str, ...]:
  """Entries of a row of the printed table."""
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
  """Yields a line for each row of cells, words aligned to the left and numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = zip(row, widths, strict=True)
    yield "  ".join(
      f"{c:<{w}}" if i < _WORDS else f"{c:>{w}}" for i, (c, w) in enumerate(cells)
    ).rstrip()
