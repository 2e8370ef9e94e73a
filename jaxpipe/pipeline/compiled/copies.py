"""Finds whole-ring copies, which the optimized program must not contain inside its loops.

A ring buffer is written one slot a tick, in place. Where XLA cannot do that, because a conditional
both reads a ring and returns it or because a consumer wants another layout, it copies the whole
ring every tick. Nothing but the text of the optimized program says so:

    %put = bf16[4,2,8]{2,1,0} fusion(%ring, %i, %x), calls=%dus     in place: %dus ends with a
                                                                    dynamic-update-slice of %ring
    %bad = bf16[4,2,8]{1,2,0} copy(%ring)                           a copy, into another layout

See `docs/decisions/0007-pools-of-saved-values.md` and `0011-row-major-pools.md` for what such
copies cost and how the executor avoids them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator

from jax.typing import DTypeLike

from jaxpipe.pipeline.compiled.hlo import HloModule, Instruction, Shape
from jaxpipe.pipeline.compiled.walk import Visit, visits

# Opcodes that hand an array on without writing it, or that write a part of it in place.
_PASSING = {
  *("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"),
  *("dynamic-update-slice", "optimization-barrier", "copy-done", "add-dependency"),
  *("async-start", "async-update", "async-done", "call-start", "call-done"),
}
# Opcodes whose result is all of their operand, so that a ring read through them is still that ring.
_TRANSPARENT = ("bitcast", "reshape", "copy-done", "optimization-barrier")
# The memory space in a layout: `S(1)` is the TPU's vector memory; HBM, which is 0, is not written.
_MEMORY = re.compile(r"S\(\d+\)(SC\([\d:]*\))?")
# Beginnings of the opcodes of collectives, which write what they have received.
_COLLECTIVES = ("all-", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class RingCopy:
  """An instruction inside a loop or a branch that writes as much as a whole ring holds.

  Attributes:
    name: of the instruction.
    opcode: of the instruction.
    op_name: path of the JAX name scopes that it was traced under; empty if the compiler made it.
    ring: shape of the ring that it writes, or reads whole.
    source: type and layout of its first operand; empty if there is none.
    written: type and layout of its result. How the two differ is why the copy exists: another order
      of dims, which a consumer wants, or another memory (`S(1)`).
    computation: name of the computation that it stands in.
    cycles: the compiler's estimate of one execution; None if it gives none.
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
    """Whether the ring only goes to another memory, as the TPU compiler does with small ones."""
    same_layout = _MEMORY.sub("", self.source) == _MEMORY.sub("", self.written)
    return self.opcode == "copy-start" and same_layout and self.source != self.written


def ring_copies(
  module: HloModule, rings: Collection[tuple[DTypeLike, tuple[int, ...]]]
) -> list[RingCopy]:
  """Finds the instructions inside loops or branches that write or read a whole ring at once.

  Args:
    module: the program.
    rings: (dtype, shape [slots, ...]) of each ring on one device. Leave out a ring of one slot:
      nothing tells a copy of it from a copy of the value in it.

  Returns:
    Copies, transposes, conversions, fills, selects, fusions that are not in place, and whatever
    else is neither a slice of a ring nor an update of a slice of it.
  """
  shapes = {Shape.of(dtype, dims) for dtype, dims in rings}
  # By computation and name: an instruction that has several kinds of surroundings is one copy.
  found: dict[tuple[str, str], RingCopy] = {}
  for visit in visits(module):
    instruction = visit.instruction
    # What runs once in a step, such as a fill before the loop, is not what this looks for.
    if not (visit.loops or visit.conditional) or _passes(instruction):
      continue
    for index, ring in _written(visit, shapes):
      if not _in_place(module, instruction, index):
        found[visit.computation.name, instruction.name] = _describe(visit, ring)
  return list(found.values())


def _describe(visit: Visit, ring: Shape) -> RingCopy:
  """What is reported about an instruction that copies `ring`."""
  copy, others = visit.instruction, visit.computation.instructions
  source = others[copy.operands[0]].layout if copy.operands and copy.operands[0] in others else ""
  return RingCopy(
    name=copy.name,
    opcode=copy.opcode,
    op_name=copy.op_name,
    ring=ring,
    source=source,
    written=copy.layout,
    computation=visit.computation.name,
    cycles=copy.cycles,
  )


def _passes(instruction: Instruction) -> bool:
  """Whether an instruction writes no whole array of its own accord."""
  # `lax.empty` on TPU, which reserves memory and writes nothing.
  allocates = instruction.target == "AllocateBuffer"
  collective = instruction.opcode.startswith(_COLLECTIVES)
  return instruction.opcode in _PASSING or allocates or collective


def _written(visit: Visit, rings: Collection[Shape]) -> Iterator[tuple[int, Shape]]:
  """Yields (index of the result, ring) for each result that holds as much as a whole ring.

  Such a result has a ring's own shape and dtype; or it is as large as a ring that the instruction
  reads, which it then holds in another shape, layout or dtype.
  """
  instruction = visit.instruction
  read = {s for name in instruction.operands for s in _rings_behind(visit, name, rings)}
  shapes = instruction.shapes
  # An asynchronous copy returns its source, too, behind its target.
  for index, shape in enumerate(shapes[:1] if instruction.opcode == "copy-start" else shapes):
    if shape in rings:
      yield index, shape
    else:
      yield from ((index, ring) for ring in read if _as_large(instruction, shape, ring))


def _as_large(instruction: Instruction, shape: Shape, ring: Shape) -> bool:
  """Whether a result holds all of a ring that its instruction reads."""
  # A fusion computes anything, and its result may be as large by chance: it counts as the ring only
  # if it has the ring's dims, in any order.
  if instruction.opcode == "fusion":
    return sorted(d for d in shape.dims if d > 1) == sorted(d for d in ring.dims if d > 1)
  return shape.size == ring.size


def _rings_behind(visit: Visit, name: str, rings: Collection[Shape]) -> Iterator[Shape]:
  """Yields the ring that an operand holds, if it was only given another shape on the way."""
  found = visit.computation.instructions.get(name)
  while found is not None:
    if len(found.shapes) == 1 and found.shapes[0] in rings:
      yield found.shapes[0]
      return
    if found.opcode not in _TRANSPARENT or not found.operands:
      return
    found = visit.computation.instructions.get(found.operands[0])


def _in_place(module: HloModule, instruction: Instruction, result: int) -> bool:
  """Whether a result of a fusion is one of its operands with a slice of it replaced.

  From the result backwards there may be nothing but updates of slices, changes of shape, and
  fusions of which the same is true, down to a parameter:

      %p.0 = bf16[4,2,8] parameter(0)
      %b.0 = bf16[4,2,8] bitcast(%p.0)
      ROOT %dus = bf16[4,2,8] dynamic-update-slice(%b.0, %slot, %i, %zero, %zero)

  Args:
    module: the program.
    instruction: any; one that is no fusion is not in place.
    result: which of the fusion's results, from 0.
  """
  if instruction.opcode != "fusion":
    return False
  body = module[next(name for role, name in instruction.called if role == "calls")]
  step = body.root
  if step.opcode == "tuple":
    step = body.instructions[step.operands[result]]
  while step.opcode in (*_TRANSPARENT, "dynamic-update-slice", "fusion"):
    if step.opcode == "fusion" and not _in_place(module, step, 0):
      return False
    step = body.instructions[step.operands[0]]  # the array of which a slice is replaced
  return step.opcode == "parameter"
