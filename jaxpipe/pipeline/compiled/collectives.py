"""Lists the collectives of a compiled program: what they exchange, over which mesh axes, how large.

The text of the optimized program has all of them, those that layers ask for and those that the
executor adds, after the compiler has merged, split or dropped what it wanted to. Bytes are what a
device sends when the collective is a ring, the usual convention (Thakur, Rabenseifner and Gropp,
2005, Optimization of Collective Communication Operations in MPICH, IJHPCA 19(1)):

    kind                  bytes of a device, g devices in a group
    all-reduce            2 (g - 1) / g * array
    all-gather            (g - 1) / g * output
    reduce-scatter        (g - 1) / g * input
    all-to-all            (g - 1) / g * array
    collective-permute    array

where array, input and output are those of one device. A collective counts as what the program does,
which may be more than was asked for: the CPU compiler sums in float32 what was bfloat16, and the
TPU compiler may sum whole what was to be scattered.

Which devices form a group is written in three notations. A number stands for the device at that
place in `mesh.devices.flat`:

    {{0,1},{2,3}}                      each group
    [4,2]<=[2,2,2]T(0,2,1)             0..7 as an array [2,2,2], transposed, in 4 rows of 2
    mesh['a'=2,'b'=4] {'b'}            a group for every place along the other axes
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(2)2}
                                       devices in another order; the second factor of b = 2 * 2
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxpipe.parallel.formulas import RINGS, ring
from jaxpipe.pipeline.compiled.action_paths import ActionSite, Located, locate
from jaxpipe.pipeline.compiled.hlo import HloModule, Shape, module_of

PERMUTE = "collective-permute"
KINDS = (*RINGS, PERMUTE)

Groups = Sequence[Sequence[int]]

# The notations of groups, after `replica_groups=`; the first also writes `source_target_pairs=`.
#     {{0,1},{2,3}}                       {}, which stands for all devices in one group
_EXPLICIT = re.compile(r"\{((?:\{[\d,]*\},?)*)\}")
#     [4,2]<=[8]                          [4,2]<=[2,2,2]T(0,2,1)
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
#     mesh['a'=2,'b'=4] {'b'}             mesh[a=2,b=2], device_ids=(3,2,1,0) {a}
_MESH = re.compile(
  r"mesh\[([^\]]*)\](?:,\s*device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,]*)\))?\s*\{([^}]*)\}"
)
# An order of devices in `device_ids`: an array of dims, transposed, such as [4,2]T(1,0).
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
# An axis of such a mesh, or the factor of one: 'b', or 'b':(2)2, before which stands a factor of 2.
_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One array that devices exchange.

  The compiler may merge several arrays into one instruction, which makes as many of these. An
  all-to-all whose operands are one piece for each device makes one, with the pieces stacked.

  Attributes:
    kind: one of `KINDS`.
    axes: names of the mesh axes along which the devices of a group differ, the outermost first.
    group: devices in a group. They may be fewer than the axes have, where a group is a part of
      them. Of a permute, it is the number of devices along its axes.
    shape: dims of what one device puts in.
    dtype: XLA's name of its element type.
    bytes: bytes that a device sends in one execution, by the table of the module.
    site: the action that it belongs to, and how often it runs there.
    name: of the instruction.
    senders: the devices that send, as indices into `mesh.devices.flat`, rising.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  shape: tuple[int, ...]
  dtype: str
  bytes: float
  site: ActionSite
  name: str
  senders: tuple[int, ...]

  @property
  def times(self) -> int:
    """Executions each time that the action is done; without an action, executions in one step."""
    return self.site.times


def collectives(program: str | HloModule, mesh: Mesh) -> tuple[Collective, ...]:
  """Returns what the devices of a program exchange, in the order in which it was scheduled.

  An asynchronous collective counts once, where it starts. One whose groups are single devices is
  left out, since nothing is sent.

  Args:
    program: `compiled.as_text()`, or what `parse` made of it.
    mesh: the mesh that it was compiled for.

  Raises:
    ValueError: a text that is no program, one for more devices than the mesh has, or groups written
      in a way that is not known.
  """
  found = locate(module_of(program), lambda opcode: opcode.removesuffix("-start") in KINDS)
  return tuple(itertools.chain.from_iterable(_read(one, mesh) for one in found))


def _read(found: Located, mesh: Mesh) -> Iterator[Collective]:
  """Yields a collective for each array of an instruction; none if no device sends to another."""
  kind, attributes = _kind(found), found.instruction.attributes
  if kind == PERMUTE:
    groups = source_target_pairs(attributes)
    senders = sorted(source for source, _ in groups)
  else:
    groups = [group for group in replica_groups(attributes, mesh.size) if len(group) > 1]
    senders = sorted(itertools.chain.from_iterable(groups))
  if not groups:
    return
  axes = axes_of(groups, mesh)
  # The groups of a permute are pairs, whose size says nothing.
  along = math.prod(mesh.shape[axis] for axis in axes)
  group = along if kind == PERMUTE else max(map(len, groups))
  for shape in _inputs(kind, found):
    yield Collective(
      kind=kind,
      axes=axes,
      group=group,
      shape=shape.dims,
      dtype=shape.dtype,
      bytes=_bytes(kind, shape.bytes, group),
      site=found.site,
      name=found.instruction.name,
      senders=tuple(senders),
    )


def _kind(found: Located) -> str:
  """The kind of a collective, which is its opcode but for one fusion that TPU programs have."""
  kind = found.instruction.opcode.removesuffix("-start")
  # The TPU compiler writes a reduce-scatter as an all-reduce fused with the slice that is kept:
  #     fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  fused = bool(found.frames) and found.frames[-1].callee.startswith("all-reduce-scatter")
  return "reduce-scatter" if kind == "all-reduce" and fused else kind


def _inputs(kind: str, found: Located) -> list[Shape]:
  """Shapes of the arrays that a device puts into a collective."""
  body = found.computation.instructions
  known = [body[name] for name in found.instruction.operands if name in body]
  shapes = [shape for operand in known for shape in operand.shapes]
  # An all-to-all along a dim has one operand per array. Without a dim, it has one per device:
  #     (f32[6], f32[6]) all-to-all(%a, %b), replica_groups={{0,1},{2,3}}
  if kind == "all-to-all" and len(shapes) > 1 and "dimensions=" not in found.instruction.attributes:
    return [Shape(shapes[0].dtype, (len(shapes), *shapes[0].dims))]
  return shapes


def _bytes(kind: str, size: int, group: int) -> float:
  """Bytes that a device sends, of an operand of `size` bytes."""
  if kind == PERMUTE:
    return float(size)
  return ring(kind, size * group if kind == "all-gather" else size, group)


def replica_groups(attributes: str, devices: int) -> Groups:
  """Returns the groups of a collective, each a sequence of device numbers.

  Args:
    attributes: of the instruction, as in the text.
    devices: number of devices of the program, which are one group where no groups are written.

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
  """Returns the [source, target] of each transfer of a permute between two different devices."""
  found = _EXPLICIT.match(attributes.partition("source_target_pairs=")[2])
  pairs = [_numbers(one) for one in re.findall(r"\{([\d,]*)\}", found[1])] if found else []
  return [pair for pair in pairs if pair[0] != pair[1]]


def axes_of(groups: Groups, mesh: Mesh) -> tuple[str, ...]:
  """Returns the mesh axes along which devices of one group differ, the outermost first.

  Args:
    groups: at least one, each of device numbers.
    mesh: whose `devices.flat` the numbers index.

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
  """The numbers of a list such as `0,1,2`; none of an empty text."""
  return [int(number) for number in text.split(",") if number]


def _iota(dims: Sequence[int], order: str | None) -> np.ndarray:
  """The numbers 0, 1, ... as an array of these dims, transposed by an order such as `0,2,1`."""
  numbers = np.arange(math.prod(dims)).reshape(dims)
  return numbers.transpose(_numbers(order)) if order else numbers


def _along(axes: str, order: str | None, over: str) -> Groups:
  """Returns the groups of the third notation.

  The axes of the mesh are divided into the factors that `over` names, so that devices form an array
  with one dim for each factor; a group runs along the named factors, the others are fixed. With
  `mesh['a'=2,'b'=4] {'b':(2)2}`, the dims are a = 2, b's first factor 2 and its second factor 2,
  and groups run along the last.

  Args:
    axes: names and sizes of the mesh axes, `'a'=2,'b'=4`.
    order: of the devices in the mesh; None if they rise.
    over: the axes, or factors of axes, that a group runs along.
  """
  sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
  chosen = [(name, pre, size) for name, pre, size in _AXIS.findall(over)]
  dims: list[int] = []
  dim_of: dict[tuple[str, int], int] = {}  # (axis, product of the factors before this one) -> dim
  for name, size in sizes.items():
    bounds = {1, size}
    for axis, pre, factor in chosen:
      if axis == name and pre:
        bounds |= {int(pre), int(pre) * int(factor)}
    for low, high in itertools.pairwise(sorted(bounds)):
      dim_of[name, low] = len(dims)
      dims.append(high // low)
  grid = _devices(order, math.prod(sizes.values())).reshape(dims)
  # An axis of size 1 has no dim: nothing differs along it.
  keys = [(name, int(pre or 1)) for name, pre, _ in chosen]
  inside = [dim_of[key] for key in keys if key in dim_of]
  outside = [dim for dim in range(len(dims)) if dim not in inside]
  group = math.prod(dims[dim] for dim in inside)
  return grid.transpose([*outside, *inside]).reshape(-1, group).tolist()


def _devices(order: str | None, count: int) -> np.ndarray:
  """Device numbers [count] in the order of a mesh's `device_ids`: `[4,2]T(1,0)`, or a list."""
  if not order:
    return np.arange(count)
  if found := _ORDER.match(order):
    return _iota(_numbers(found[1]), found[2]).reshape(-1)
  return np.array(_numbers(order))
