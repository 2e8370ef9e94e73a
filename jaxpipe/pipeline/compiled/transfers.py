"""Finds the transfers between stages, and what the compiled program does while they are under way.

A transfer costs no time only if it starts early and ends late. The text lists instructions in the
order in which they were scheduled, so that whatever stands between a transfer's start and its end
runs beside it:

    %start = (bf16[2,8], bf16[2,8], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
    %choice = bf16[2,8] conditional(%kind, %a, %b), branch_computations={%idle, %work}   beside it
    %done = bf16[2,8] collective-permute-done(%start)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxpipe.pipeline.compiled.cycles import Cost, Estimates
from jaxpipe.pipeline.compiled.hlo import Computation, HloModule, Instruction
from jaxpipe.pipeline.compiled.walk import visits

_PERMUTE = "collective-permute"


@dataclasses.dataclass(frozen=True)
class Permute:
  """A transfer between devices.

  Attributes:
    name: of the instruction that starts the transfer.
    computation: name of the computation that this instruction stands in.
    asynchronous: whether other instructions may run before the transfer is done.
    conditional: name of the outermost conditional round it; None if there is none. Devices may take
      different branches of it, and the transfer waits for those that do not come: a dead-lock.
    in_loop: whether it stands in a loop.
    under: (name, opcode, op_name, cost) of each instruction that is scheduled between its start and
      its end and takes time, other transfers excepted.
  """

  name: str
  computation: str
  asynchronous: bool
  conditional: str | None
  in_loop: bool
  under: tuple[tuple[str, str, str, Cost], ...]

  @property
  def hidden(self) -> Cost:
    """Cost of all that runs beside it; `least` is that of a device which has no action then."""
    return Cost.sum(cost for *_, cost in self.under)


def permutes(module: HloModule) -> list[Permute]:
  """Lists the transfers between devices, each instruction that starts one once.

  A computation may be called from several places: a transfer in it is in a loop, or in a
  conditional, if that is so for any of them.
  """
  estimates = Estimates(module)
  found: dict[tuple[str, str], Permute] = {}
  for visit in visits(module):
    instruction, computation = visit.instruction, visit.computation
    asynchronous = _starts(module, instruction)
    if asynchronous is None:
      continue
    before = found.get((computation.name, instruction.name))
    found[computation.name, instruction.name] = Permute(
      name=instruction.name,
      computation=computation.name,
      asynchronous=asynchronous,
      conditional=visit.conditional or (before.conditional if before else None),
      in_loop=bool(visit.loops) or bool(before and before.in_loop),
      under=tuple(_between(computation, instruction, estimates)) if asynchronous else (),
    )
  return list(found.values())


def _starts(module: HloModule, instruction: Instruction) -> bool | None:
  """Whether an instruction starts a transfer: True asynchronously, None if it starts none."""
  # The generic form wraps the transfer in a computation of its own:
  #     %start = ((bf16[2,8]), bf16[2,8]) async-start(%x), calls=%wrapped
  if instruction.opcode == "async-start":
    inner = [i.opcode for name in instruction.runs for i in module[name]]
    return True if _PERMUTE in inner else None
  return {_PERMUTE: False, f"{_PERMUTE}-start": True}.get(instruction.opcode)


def _between(
  computation: Computation, start: Instruction, estimates: Estimates
) -> Iterator[tuple[str, str, str, Cost]]:
  """Yields what takes time among the instructions from a transfer's start to its end."""
  names = list(computation.instructions)
  # Names that stand for the transfer: its start, and each `async-update` of it.
  carried = {start.name}
  for name in names[names.index(start.name) + 1 :]:
    instruction = computation.instructions[name]
    if carried & set(instruction.operands):
      if instruction.opcode.endswith("-done"):
        return
      carried.add(name)
    elif _PERMUTE not in instruction.opcode:
      cost = estimates.of(instruction)
      if cost.most or cost.unknown:
        yield name, instruction.opcode, instruction.op_name, cost
