"""What a compiled program says between its devices: each collective, over which axes, how large.

The text of the optimized program has them all, those that layers ask for and those that the
executor adds, after the compiler has merged, split or dropped what it wanted to. Bytes are what a
device sends when the collective is a ring, the usual convention (Thakur, Rabenseifner and Gropp,
2005, Optimization of Collective Communication Operations in MPICH, IJHPCA 19(1)):

    kind                  bytes of a device, g devices in a group
    all-reduce            2 (g - 1) / g * array
    all-gather            (g - 1) / g * output
    reduce-scatter        (g - 1) / g * input
    all-to-all            (g - 1) / g * array
    collective-permute    array

where array, input and output are those of one device. Compilers also cheat: CPU sums in float32
what was bfloat16, and TPU may sum whole what was to be scattered. Both count as what they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from jaxpipe.parallel.formulas import RINGS, ring
from jaxpipe.pipeline.compiled.action_paths import ActionSite, every
from jaxpipe.pipeline.compiled.groups import axes_of, replica_groups, source_target_pairs
from jaxpipe.pipeline.compiled.hlo import Computation, Entered, Instruction, Module, Shape, parse

PERMUTE = "collective-permute"
KINDS = (*RINGS, PERMUTE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One array that devices exchange.

  A collective of several arrays, as compilers make them, is as many of these; one that comes in a
  piece for every device is one, its shape that of the pieces stacked.

  Attributes:
    kind: one of `KINDS`.
    axes: of the mesh, along which the devices of a group differ, the outermost first.
    group: devices in a group: fewer than the axes have where a group is a part of them; of a
      permute, all along its axes.
    shape, dtype: of what a device puts in.
    bytes: that a device sends each time; see the module.
    place: the action that it belongs to, and how often it runs.
    name: of the instruction.
    senders: places in the mesh of the devices that send, in `mesh.devices.flat`.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  shape: tuple[int, ...]
  dtype: str
  bytes: float
  place: ActionSite
  name: str
  senders: tuple[int, ...]

  @property
  def elements(self) -> int:
    """Of what a device puts in."""
    return math.prod(self.shape)

  @property
  def operand_bytes(self) -> int:
    """The same in bytes."""
    return Shape(self.dtype, self.shape).bytes

  @property
  def scope(self) -> str | None:
    """The action, or the end of the pipeline, that it belongs to; None if to none."""
    return self.place.path[-1] if self.place.path else None

  @property
  def times(self) -> int:
    """How often it runs each time that the action is done, or, outside of all, in one step."""
    return self.place.times


def collectives(program: str | Module, mesh: Mesh) -> tuple[Collective, ...]:
  """Returns what the devices of a program exchange, in the order of the text.

  An asynchronous collective counts once, where it starts. One between a device and itself is left
  out.

  Args:
    program: `compiled.as_text()`, or what `parse` made of it.
    mesh: the mesh that it was compiled for.

  Raises:
    ValueError: a text that is no program, one for more devices than the mesh has, or groups written
      in a way that is not known.
  """
  module = parse(program) if isinstance(program, str) else program
  found = every(module, lambda opcode: opcode.removesuffix("-start") in KINDS)
  return tuple(
    itertools.chain.from_iterable(
      _read(one, where, way, place, mesh) for one, where, way, place in found
    )
  )


def _read(
  one: Instruction, where: Computation, way: Sequence[Entered], place: ActionSite, mesh: Mesh
) -> Iterator[Collective]:
  """One for each array of an instruction."""
  kind = _kind(one, way)
  if kind == PERMUTE:
    groups = source_target_pairs(one.attributes)
    senders = sorted(source for source, _ in groups)
  else:
    groups = [g for g in replica_groups(one.attributes, mesh.size) if len(g) > 1]
    senders = sorted(itertools.chain.from_iterable(groups))
  if not groups:
    return
  axes = axes_of(groups, mesh)
  along = math.prod(mesh.shape[axis] for axis in axes)
  group = along if kind == PERMUTE else max(map(len, groups))
  for shape in _arrays(kind, one, where):
    yield Collective(
      kind=kind,
      axes=axes,
      group=group,
      shape=shape.dims,
      dtype=shape.dtype,
      bytes=_bytes(kind, shape.bytes, group),
      place=place,
      name=one.name,
      senders=tuple(senders),
    )


def _kind(one: Instruction, way: Sequence[Entered]) -> str:
  """Of an instruction; TPU fuses a sum with the slice that each device keeps of it."""
  kind = one.opcode.removesuffix("-start")
  if kind == "all-reduce" and way and way[-1].into.startswith("all-reduce-scatter"):
    return "reduce-scatter"
  return kind


def _arrays(kind: str, one: Instruction, where: Computation) -> list[Shape]:
  """What a device puts in."""
  known = [where.instructions[name] for name in one.operands if name in where.instructions]
  shapes = [shape for operand in known for shape in operand.shapes]
  if kind == "all-to-all" and len(shapes) > 1 and "dimensions=" not in one.attributes:
    return [Shape(shapes[0].dtype, (len(shapes), *shapes[0].dims))]
  return shapes


def _bytes(kind: str, size: int, group: int) -> float:
  """What a device sends, of an operand of `size` bytes."""
  if kind == PERMUTE:
    return float(size)
  return ring(kind, size * group if kind == "all-gather" else size, group)
