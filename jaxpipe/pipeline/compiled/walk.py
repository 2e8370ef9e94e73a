"""Goes through the instructions of a program that run, together with the calls that lead to them.

A computation may have several callers. `visits` yields its instructions once for each kind of
surroundings, which answers whether an instruction stands in any loop or conditional. `walk` yields
them once for each path of calls, which sums over all that runs need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxpipe.pipeline.compiled.hlo import Computation, HloModule, Instruction


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction that is scheduled, and the loops and conditionals round it.

  Attributes:
    instruction: the instruction.
    computation: the computation that it stands in.
    loops: number of loops round it.
    conditional: name of the outermost conditional round it; None if there is none.
  """

  instruction: Instruction
  computation: Computation
  loops: int
  conditional: str | None


def visits(module: HloModule) -> Iterator[Visit]:
  """Yields each scheduled instruction, once for each kind of surroundings that it runs in.

  Surroundings are of one kind if they agree on whether there is a loop and on which conditional is
  the outermost. Instructions inside a fusion are not scheduled, and so not visited.
  """
  seen: set[tuple[str, bool, str | None]] = set()
  todo: list[tuple[str, int, str | None]] = [(module.entry, 0, None)]
  while todo:
    name, loops, conditional = todo.pop()
    # Two loops round a computation are like one: without this, a computation that is called at many
    # depths would be visited at each.
    if (name, loops > 0, conditional) in seen:
      continue
    seen.add((name, loops > 0, conditional))
    for instruction in module[name]:
      yield Visit(instruction, module[name], loops, conditional)
      # An action is a branch of an outermost conditional, whatever it chooses further in.
      outermost = conditional or (instruction.name if instruction.opcode == "conditional" else None)
      inner_loops = loops + (instruction.opcode == "while")
      todo += [(inner, inner_loops, outermost) for inner in instruction.runs]


@dataclasses.dataclass(frozen=True)
class Frame:
  """One call on the way from the entry computation to an instruction, as in a call stack.

  Attributes:
    instruction: the caller: a loop, a conditional, a call or a fusion.
    caller: name of the computation that the instruction stands in.
    callee: name of the computation that the instruction runs.
  """

  instruction: Instruction
  caller: str
  callee: str


def walk(
  module: HloModule, name: str = "", frames: tuple[Frame, ...] = ()
) -> Iterator[tuple[Instruction, Computation, tuple[Frame, ...]]]:
  """Yields every instruction that runs, those inside fusions included.

  Other than `visits`, it yields an instruction once for every path of calls that leads to it: a
  computation with several callers runs in all of them.

  Args:
    module: the program.
    name: computation to begin with; default, the entry computation.
    frames: calls that lead to that computation, outermost first.

  Yields:
    The instruction, the computation that it stands in, and the calls that lead there, outermost
    first. An instruction precedes the instructions of the computations that it runs.
  """
  computation = module[name or module.entry]
  for instruction in computation:
    yield instruction, computation, frames
    for callee in instruction.holds:
      if callee in module.computations:
        frame = Frame(instruction, computation.name, callee)
        yield from walk(module, callee, (*frames, frame))
