"""Counts the FLOPs of a compiled program's matrix products, by action of the schedule.

XLA's own count takes the body of a loop once, and of a conditional the most expensive branch. Here
a loop counts as often as it runs, and a branch as often as the schedule has its action. Only `dot`s
are read, which the CPU compiler leaves as they are; the TPU compiler makes convolutions of them and
the GPU compiler calls of libraries, so that their programs would count too little:

    %dot = f32[4,16] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    with %x = f32[4,8]:   2 * (4 * 16) * 8 FLOPs
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

from jaxpipe.pipeline.compiled.action_paths import ActionSite, locate, once_each, runs
from jaxpipe.pipeline.compiled.hlo import Computation, HloModule, Instruction, module_of
from jaxpipe.schedules import Schedule

# The dims of the first operand that are summed over.
#     dot(%x, %w), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, ...
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul:
  """A matrix product.

  Attributes:
    name: of the instruction.
    flops: of one execution on one device; a multiplication and an addition count one each.
    site: the action that it belongs to, and how often it runs there.
  """

  name: str
  flops: int
  site: ActionSite


def matmuls(program: str | HloModule) -> tuple[Matmul, ...]:
  """Returns the matrix products of a program, once for every path of calls that leads to one.

  Args:
    program: `compiled.as_text()`, or what `parse` made of it.
  """
  return tuple(
    Matmul(
      name=found.instruction.name,
      flops=_flops(found.instruction, found.computation),
      site=found.site,
    )
    for found in locate(module_of(program), lambda opcode: opcode == "dot")
  )


def flops_of_actions(program: str | HloModule) -> dict[tuple[str, ...], int]:
  """Returns the FLOPs of the matrix products of each action, each time that it is done.

  Args:
    program: `compiled.as_text()`, or what `parse` made of it.

  Returns:
    Path of an `ActionSite` -> FLOPs on one device. Under `()` are the FLOPs in one step of what
    belongs to no action.
  """
  sums: dict[tuple[str, ...], int] = collections.defaultdict(int)
  for matmul in once_each(matmuls(program), lambda matmul: matmul.flops):
    sums[matmul.site.path] += matmul.flops * matmul.site.times
  return dict(sums)


def flops_of_step(actions: Mapping[tuple[str, ...], int], schedule: Schedule) -> tuple[int, ...]:
  """Returns the FLOPs of one step: those of each action times the number of its runs.

  Args:
    actions: from `flops_of_actions`.
    schedule: of the step.

  Returns:
    FLOPs of each device along `stage`.
  """
  each = [[flops * n for n in runs(schedule, path)] for path, flops in actions.items()]
  return tuple(map(sum, zip(*each, strict=True)))


def _flops(dot: Instruction, computation: Computation) -> int:
  """FLOPs of one execution: two for every element of the result and of the contracted dims."""
  (left,) = computation.instructions[dot.operands[0]].shapes
  found = _CONTRACTED.search(dot.attributes)
  dims = [int(dim) for dim in found[1].split(",") if dim] if found else []
  return 2 * dot.shapes[0].size * math.prod(left.dims[dim] for dim in dims)
