"""Whole-ring copies: what the optimized program must not contain.

A ring is written one slot a tick, in place. Where XLA cannot do that (a conditional that reads a
ring and returns it, a consumer that wants another layout) it copies the whole ring, every tick, and
nothing but the optimized program says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from typing import Any

from jaxpipe.pipeline.compiled.hlo import Instruction, Module, Shape, Visit, visits

# These hand an array on without writing it, or write a part of it in place.
_PASSING = {
  *("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"),
  *("dynamic-update-slice", "optimization-barrier", "copy-done", "add-dependency"),
  *("async-start", "async-update", "async-done", "call-start", "call-done"),
}
_TRANSPARENT = ("bitcast", "reshape", "copy-done", "optimization-barrier")
# The memory that an array lies in, as its layout says; 0, which is not written, is HBM.
_MEMORY = re.compile(r"S\(\d+\)(SC\([\d:]*\))?")
_COLLECTIVES = ("all-", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class RingCopy:
  """An instruction inside a loop or a branch that writes as much as a whole ring holds.

  Attributes:
    name, opcode, op_name: of the instruction.
    ring: the ring that it writes or reads whole.
    source, written: types and layouts of its operand and its result: how they differ is why it is
      there (an order of dims that a consumer wants, or S(1), the TPU's vector memory).
    computation: where it stands.
    cycles: the compiler's estimate, None if it gives none.
  """

  name: str
  opcode: str
  op_name: str
  ring: Shape
  source: str
  written: str
  computation: str
  cycles: int | None

  @property
  def moved(self) -> bool:
    """Whether it only goes to another memory, as the TPU compiler does with what is small."""
    same_layout = _MEMORY.sub("", self.source) == _MEMORY.sub("", self.written)
    return self.opcode == "copy-start" and same_layout and self.source != self.written


def ring_copies(module: Module, rings: Collection[tuple[Any, tuple[int, ...]]]) -> list[RingCopy]:
  """Finds what writes or reads a whole ring at once, inside a loop or a branch.

  Args:
    module: the program.
    rings: (dtype, shape) of each ring on one device. A ring of one slot looks like what is put into
      it: leave it out.

  Returns:
    Copies, transposes, conversions, fills, selects, fusions that are not in place, and whatever
    else is no slice of a ring and no update of a slice of it.
  """
  shapes = {Shape.of(dtype, dims) for dtype, dims in rings}
  found: dict[tuple[str, str], RingCopy] = {}
  for visit in visits(module):
    one = visit.instruction
    if not (visit.loops or visit.conditional) or _passes(one):
      continue
    for index, ring in _written(visit, shapes):
      if not _in_place(module, one, index):
        found[visit.computation.name, one.name] = _describe(visit, ring)
  return list(found.values())


def _describe(visit: Visit, ring: Shape) -> RingCopy:
  one, body = visit.instruction, visit.computation.instructions
  source = body[one.operands[0]].layout if one.operands and one.operands[0] in body else ""
  where = visit.computation.name
  return RingCopy(one.name, one.opcode, one.op_name, ring, source, one.layout, where, one.cycles)


def _passes(one: Instruction) -> bool:
  # `lax.empty` on TPU: space without contents.
  allocates = one.target == "AllocateBuffer"
  collective = one.opcode.startswith(_COLLECTIVES)
  return one.opcode in _PASSING or allocates or collective


def _written(visit: Visit, rings: Collection[Shape]) -> Iterator[tuple[int, Shape]]:
  """The results that are a whole ring, or all of one in another shape, layout or dtype."""
  read = {s for name in visit.instruction.operands for s in _rings_behind(visit, name, rings)}
  shapes = visit.instruction.shapes
  # An asynchronous copy returns its source too.
  for index, shape in enumerate(shapes[:1] if visit.instruction.opcode == "copy-start" else shapes):
    if shape in rings:
      yield index, shape
    else:
      yield from ((index, ring) for ring in read if _as_large(visit.instruction, shape, ring))


def _as_large(one: Instruction, shape: Shape, ring: Shape) -> bool:
  """Whether a result holds all of a ring that is read; a fusion may be as large by chance."""
  if one.opcode == "fusion":
    return sorted(d for d in shape.dims if d > 1) == sorted(d for d in ring.dims if d > 1)
  return shape.size == ring.size


def _rings_behind(visit: Visit, name: str, rings: Collection[Shape]) -> Iterator[Shape]:
  """The ring that an operand is, if only its shape was changed on the way."""
  one = visit.computation.instructions.get(name)
  while one is not None:
    if len(one.shapes) == 1 and one.shapes[0] in rings:
      yield one.shapes[0]
      return
    if one.opcode not in _TRANSPARENT or not one.operands:
      return
    one = visit.computation.instructions.get(one.operands[0])


def _in_place(module: Module, one: Instruction, result: int) -> bool:
  """Whether a fusion's result is one of its operands with a slice of it replaced."""
  if one.opcode != "fusion":
    return False
  body = module[next(name for role, name in one.called if role == "calls")]
  step = body.root
  if step.opcode == "tuple":
    step = body.instructions[step.operands[result]]
  while step.opcode in (*_TRANSPARENT, "dynamic-update-slice", "fusion"):
    if step.opcode == "fusion" and not _in_place(module, step, 0):
      return False
    step = body.instructions[step.operands[0]]
  return step.opcode == "parameter"
