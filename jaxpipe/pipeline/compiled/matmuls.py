"""What a compiled program multiplies, by action: the FLOPs of its matrix products.

XLA's own count takes the body of a loop once, and nothing of what stands in a conditional but the
dearest branch. Here loops count as often as they turn, and branches as often as the schedule has
their action. Only `dot`s are read, as the CPU compiler leaves them: TPU makes convolutions of them
and GPU calls of libraries.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

from jaxpipe.pipeline.compiled.action_paths import ActionSite, every, once_each, runs
from jaxpipe.pipeline.compiled.hlo import Computation, Instruction, Module, parse
from jaxpipe.schedules import Schedule

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul:
  """A product of two arrays.

  Attributes:
    name: of the instruction.
    flops: of one product, a multiplication and an addition each counting one.
    place: the action that it belongs to, and how often it runs.
  """

  name: str
  flops: int
  place: ActionSite


def matmuls(program: str | Module) -> tuple[Matmul, ...]:
  """Returns the matrix products of a program, in the order of the text.

  Args:
    program: `compiled.as_text()`, or what `parse` made of it.
  """
  module = parse(program) if isinstance(program, str) else program
  return tuple(
    Matmul(name=one.name, flops=_flops(one, where), place=place)
    for one, where, _, place in every(module, lambda opcode: opcode == "dot")
  )


def flops_of_actions(program: str | Module) -> dict[tuple[str, ...], int]:
  """Path of scopes -> FLOPs of its matrix products each time that the action is done.

  Under `()` stands what belongs to no action, of one step.
  """
  sums: dict[tuple[str, ...], int] = collections.defaultdict(int)
  for one in once_each(matmuls(program), lambda one: one.flops):
    sums[one.place.path] += one.flops * one.place.times
  return dict(sums)


def flops_of_step(actions: Mapping[tuple[str, ...], int], schedule: Schedule) -> tuple[int, ...]:
  """FLOPs of one step by device along `stage`: those of each action times its runs."""
  each = [[flops * n for n in runs(schedule, path)] for path, flops in actions.items()]
  return tuple(map(sum, zip(*each, strict=True)))


def _flops(one: Instruction, where: Computation) -> int:
  (left,) = where.instructions[one.operands[0]].shapes
  found = _CONTRACTED.search(one.attributes)
  dims = [int(dim) for dim in found[1].split(",") if dim] if found else []
  return 2 * one.shapes[0].size * math.prod(left.dims[dim] for dim in dims)
