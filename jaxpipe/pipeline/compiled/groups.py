"""Which devices a collective joins, and over which mesh axes that is.

XLA writes groups of device numbers in three ways, and means by a number the place of a device in
`mesh.devices.flat`:

    {{0,1},{2,3}}                      each group
    [4,2]<=[2,2,2]T(0,2,1)             0..7 as an array [2,2,2], transposed, in 4 rows of 2
    mesh['a'=2,'b'=4] {'b'}            a group for every place along the other axes
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(2)2}
                                       devices in another order; the second factor of b = 2 * 2
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

Groups = Sequence[Sequence[int]]

_EXPLICIT = re.compile(r"\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"mesh\[([^\]]*)\](?:,\s*device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,]*)\))?\s*\{([^}]*)\}"
)
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


def replica_groups(attributes: str, devices: int) -> Groups:
  """Returns the groups of a collective, one list of device numbers each.

  Args:
    attributes: of the instruction, as in the text.
    devices: of the whole program, which are one group where none is given.

  Raises:
    ValueError: groups written in a way that is not known.
  """
  text = attributes.partition("replica_groups=")[2]
  if found := _EXPLICIT.match(text):
    groups = [_numbers(one) for one in re.findall(r"\{([\d,]*)\}", found[1])]
    return groups or [range(devices)]
  if found := _IOTA.match(text):
    return _iota(_numbers(found[2]), found[3]).reshape(_numbers(found[1])).tolist()
  if found := _MESH.match(text):
    return _along(found[1], found[2], found[3])
  if not text:
    return [range(devices)]
  raise ValueError(f"replica_groups={text[:60]!r} are written in a way that is not known")


def source_target_pairs(attributes: str) -> Groups:
  """Returns the [source, target] of each transfer of a permute between two devices."""
  found = _EXPLICIT.match(attributes.partition("source_target_pairs=")[2])
  pairs = [_numbers(one) for one in re.findall(r"\{([\d,]*)\}", found[1])] if found else []
  return [pair for pair in pairs if pair[0] != pair[1]]


def axes_of(groups: Groups, mesh: Mesh) -> tuple[str, ...]:
  """Names of the mesh axes along which devices of one group differ, the outermost first.

  Raises:
    ValueError: the program has more devices than the mesh.
  """
  most = max(max(group, default=0) for group in groups)
  if most >= mesh.size:
    raise ValueError(
      f"the program knows a device {most}, but the mesh has {mesh.size}; pass its own"
    )
  places = [np.unravel_index(np.array(group, int), mesh.devices.shape) for group in groups]
  differ = [any(np.ptp(place[i]) > 0 for place in places) for i in range(mesh.devices.ndim)]
  return tuple(axis for axis, differs in zip(mesh.axis_names, differ, strict=True) if differs)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def _iota(dims: Sequence[int], order: str | None) -> np.ndarray:
  """0, 1, ... as an array of these dims, transposed."""
  numbers = np.arange(math.prod(dims)).reshape(dims)
  return numbers.transpose(_numbers(order)) if order else numbers


def _along(axes: str, order: str | None, over: str) -> Groups:
  """Groups along `over`, which names axes of a mesh, or factors of them."""
  sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
  chosen = [(name, pre, size) for name, pre, size in _AXIS.findall(over)]
  dims: list[int] = []
  at: dict[tuple[str, int], int] = {}  # (axis, size of what stands before the factor) -> dim
  for name, size in sizes.items():
    bounds = {1, size}
    for axis, pre, factor in chosen:
      if axis == name and pre:
        bounds |= {int(pre), int(pre) * int(factor)}
    edges = sorted(bounds)
    for low, high in itertools.pairwise(edges):
      at[name, low] = len(dims)
      dims.append(high // low)
  grid = _devices(order, math.prod(sizes.values())).reshape(dims)
  mine = [at[name, int(pre or 1)] for name, pre, _ in chosen if (name, int(pre or 1)) in at]
  rest = [dim for dim in range(len(dims)) if dim not in mine]
  group = math.prod(dims[dim] for dim in mine)
  return grid.transpose([*rest, *mine]).reshape(-1, group).tolist()


def _devices(order: str | None, count: int) -> np.ndarray:
  """Device numbers in the order of such a mesh."""
  if not order:
    return np.arange(count)
  if found := _ORDER.match(order):
    return _iota(_numbers(found[1]), found[2]).reshape(-1)
  return np.array(_numbers(order))
