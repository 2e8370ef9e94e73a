"""Transfers between devices, and what the compiled program does meanwhile.

A transfer is free only if it starts early and ends late: the text lists instructions in the order
in which they were scheduled, so whatever stands between its start and its end runs beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxpipe.pipeline.compiled.cycles import Cost, Estimates
from jaxpipe.pipeline.compiled.hlo import Computation, Instruction, Module, visits

_PERMUTE = "collective-permute"


@dataclasses.dataclass(frozen=True)
class Permute:
  """A transfer between devices.

  Attributes:
    name, computation: of the instruction that starts it.
    asynchronous: whether other instructions may run before it is done.
    conditional: the conditional that it stands in, if any. Devices may take different branches, and
      those that do not come are waited for: a dead-lock.
    in_loop: whether it stands in a loop.
    under: what is scheduled between its start and its end, apart from other transfers, as (name,
      opcode, op_name, cost); only what takes time.
  """

  name: str
  computation: str
  asynchronous: bool
  conditional: str | None
  in_loop: bool
  under: tuple[tuple[str, str, str, Cost], ...]

  @property
  def hidden(self) -> Cost:
    """Cost of all that runs meanwhile: `least` on a device that takes no costly branch."""
    return Cost.sum(cost for *_, cost in self.under)


def permutes(module: Module) -> list[Permute]:
  """Lists the program's transfers between devices, in the order of the text."""
  cost = Estimates(module)
  found: dict[tuple[str, str], Permute] = {}
  for visit in visits(module):
    one, where = visit.instruction, visit.computation
    carrier = _carrier(module, one)
    if carrier is None:
      continue
    # The same computation may stand in several places; the worst of them counts.
    before = found.get((where.name, one.name))
    found[where.name, one.name] = Permute(
      name=one.name,
      computation=where.name,
      asynchronous=carrier,
      conditional=visit.conditional or (before.conditional if before else None),
      in_loop=bool(visit.loops) or bool(before and before.in_loop),
      under=tuple(_between(where, one, cost)) if carrier else (),
    )
  return list(found.values())


def _carrier(module: Module, one: Instruction) -> bool | None:
  """Whether an instruction starts a transfer: True if asynchronously, None if it starts none."""
  if one.opcode == "async-start":
    inner = [i.opcode for name in one.runs for i in module[name]]
    return True if _PERMUTE in inner else None
  return {_PERMUTE: False, f"{_PERMUTE}-start": True}.get(one.opcode)


def _between(
  where: Computation, start: Instruction, cost: Estimates
) -> Iterator[tuple[str, str, str, Cost]]:
  """What is scheduled from a transfer's start to its end and takes time."""
  names = list(where.instructions)
  carried = {start.name}
  for name in names[names.index(start.name) + 1 :]:
    one = where.instructions[name]
    if carried & set(one.operands):
      if one.opcode.endswith("-done"):
        return
      carried.add(name)  # async-update
    elif _PERMUTE not in one.opcode:
      spent = cost.of(one)
      if spent.most or spent.unknown:
        yield name, one.opcode, one.op_name, spent
