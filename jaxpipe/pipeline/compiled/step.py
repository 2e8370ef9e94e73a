"""Sums up one compiled pipelined step: its memory, ring copies, transfers and estimated cycles.

A schedule promises a peak of memory and an overlap of transfers with work. Whether a step keeps
these promises only the optimized program can say: no ring may be copied, filled or laid out anew
inside the loop over the ticks, and every transfer must run beside work. `read_compiled` collects
the answers of this folder's other modules into one value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax
from jax.typing import DTypeLike

from jaxpipe.pipeline.compiled.copies import RingCopy, ring_copies
from jaxpipe.pipeline.compiled.cycles import Branch, Cost, Loop, branches, loops, outside_loops
from jaxpipe.pipeline.compiled.hlo import module_of
from jaxpipe.pipeline.compiled.transfers import Permute, permutes


@dataclasses.dataclass(frozen=True)
class Memory:
  """The compiler's memory analysis of one device, in bytes.

  Attributes:
    arguments: of the arguments of a call.
    outputs: of the results of a call.
    aliased: of the results that take the place of donated arguments, counted in both of the above.
    temporary: of what the program allocates for itself.
    code: of the program.
  """

  arguments: int
  outputs: int
  aliased: int
  temporary: int
  code: int

  @property
  def total(self) -> int:
    """Bytes that the device must hold at once."""
    return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
  """Everything that is read from one compiled step.

  Attributes:
    instructions: number of instructions, those inside fusions included: the program's size.
    memory: of one device; None where the backend gives no analysis.
    copies: whole-ring copies inside loops and branches; there should be none.
    permutes: transfers between devices.
    branches: branches of the conditionals that are in no other conditional.
    loops: loops that are in no other loop and in no conditional.
    once: estimated cycles of what is outside all loops and conditionals, such as the optimizer.
  """

  instructions: int
  memory: Memory | None
  copies: tuple[RingCopy, ...]
  permutes: tuple[Permute, ...]
  branches: tuple[Branch, ...]
  loops: tuple[Loop, ...]
  once: Cost

  def action(self, scope: str) -> Cost | None:
    """Returns the cost of the most expensive branch with this scope; None where there is none."""
    found = [branch.cost for branch in self.branches if branch.scope == scope]
    return max(found, key=lambda cost: cost.most, default=None)

  @property
  def unscoped(self) -> Cost:
    """Cost of the branches in loops that have no scope, of each conditional the most expensive."""
    most_expensive: dict[str, Cost] = {}
    for branch in self.branches:
      if branch.scope is None and branch.in_loop:
        best = most_expensive.get(branch.conditional, Cost())
        most_expensive[branch.conditional] = max(best, branch.cost, key=lambda cost: cost.most)
    return Cost.sum(most_expensive.values())

  @property
  def every_tick(self) -> Cost:
    """Cost of a tick besides its action: one iteration of the longest loop, which is over ticks."""
    longest = max(self.loops, key=lambda loop: loop.trips or 0, default=None)
    return longest.outside if longest else Cost()


def read_compiled(
  compiled: jax.stages.Compiled,
  rings: Collection[tuple[DTypeLike, tuple[int, ...]]] = (),
  scopes: Collection[str] = (),
) -> CompiledStep:
  """Reads a compiled program.

  Args:
    compiled: what `jax.jit(f).lower(...).compile()` returns.
    rings: (dtype, shape [slots, ...]) of each ring buffer on one device; see `ring_copies`.
    scopes: names of the `jax.named_scope`s round the actions, to tell the branches apart.

  Raises:
    ValueError: the program's text has no entry computation.
  """
  module = module_of(compiled)
  return CompiledStep(
    instructions=sum(len(body.instructions) for body in module.computations.values()),
    memory=memory(compiled),
    copies=tuple(ring_copies(module, rings)),
    permutes=tuple(permutes(module)),
    branches=tuple(branches(module, scopes)),
    loops=tuple(loops(module)),
    once=outside_loops(module),
  )


def memory(compiled: jax.stages.Compiled) -> Memory | None:
  """Returns the memory analysis of a compiled program; None where the backend gives none."""
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
