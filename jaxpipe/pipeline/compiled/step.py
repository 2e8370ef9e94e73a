"""What the compiler made of a pipelined step.

A schedule's memory and overlap are promises about the optimized program: no ring is ever copied,
filled or laid out anew inside the loop over the ticks, and every transfer runs beside work. Nothing
but that program can say whether they are kept; this reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxpipe.pipeline.compiled.copies import RingCopy, ring_copies
from jaxpipe.pipeline.compiled.cycles import Branch, Cost, Loop, branches, loops, outside_loops
from jaxpipe.pipeline.compiled.hlo import parse
from jaxpipe.pipeline.compiled.transfers import Permute, permutes


@dataclasses.dataclass(frozen=True)
class Memory:
  """The compiler's memory analysis of one device, in bytes.

  Attributes:
    arguments, outputs: of the call.
    aliased: outputs that take the place of donated arguments.
    temporary: what the program allocates for itself.
    code: the program.
  """

  arguments: int
  outputs: int
  aliased: int
  temporary: int
  code: int

  @property
  def total(self) -> int:
    """What the device must hold."""
    return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
  """All that is read from one program.

  Attributes:
    instructions: their number, a measure of the program's size; those inside fusions count.
    memory: None where the backend gives no analysis.
    copies, permutes, branches, loops: see there.
    once: estimated cycles of what stands outside all loops, such as the optimizer.
  """

  instructions: int
  memory: Memory | None
  copies: tuple[RingCopy, ...]
  permutes: tuple[Permute, ...]
  branches: tuple[Branch, ...]
  loops: tuple[Loop, ...]
  once: Cost

  def action(self, scope: str) -> Cost | None:
    """Cost of the dearest branch that bears a scope, None where no branch does."""
    found = [branch.cost for branch in self.branches if branch.scope == scope]
    return max(found, key=lambda cost: cost.most, default=None)

  @property
  def unscoped(self) -> Cost:
    """Cost of the branches that bear none of the scopes, each conditional by its dearest."""
    dearest: dict[str, Cost] = {}
    for branch in self.branches:
      if branch.scope is None and branch.in_loop:
        best = dearest.get(branch.conditional, Cost())
        dearest[branch.conditional] = max(best, branch.cost, key=lambda cost: cost.most)
    return Cost.sum(dearest.values())

  @property
  def every_tick(self) -> Cost:
    """What a tick costs besides its action: one iteration of the longest loop."""
    longest = max(self.loops, key=lambda loop: loop.trips or 0, default=None)
    return longest.outside if longest else Cost()


def read_compiled(
  compiled: Any,
  rings: Collection[tuple[Any, tuple[int, ...]]] = (),
  scopes: Collection[str] = (),
) -> CompiledStep:
  """Reads a compiled program.

  Args:
    compiled: what `jax.jit(f).lower(...).compile()` returns.
    rings: see `ring_copies`.
    scopes: names of the `jax.named_scope`s round the actions, to tell the branches apart.
  """
  module = parse(compiled.as_text())
  return CompiledStep(
    instructions=sum(len(body.instructions) for body in module.computations.values()),
    memory=memory(compiled),
    copies=tuple(ring_copies(module, rings)),
    permutes=tuple(permutes(module)),
    branches=tuple(branches(module, scopes)),
    loops=tuple(loops(module)),
    once=outside_loops(module),
  )


def memory(compiled: Any) -> Memory | None:
  """Returns the memory analysis of a compiled program, None where the backend gives none."""
  found = compiled.memory_analysis()
  if found is None:
    return None
  return Memory(
    arguments=found.argument_size_in_bytes,
    outputs=found.output_size_in_bytes,
    aliased=found.alias_size_in_bytes,
    temporary=found.temp_size_in_bytes,
    code=found.generated_code_size_in_bytes,
  )
