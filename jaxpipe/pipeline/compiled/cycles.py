"""What the compiler believes that its program costs, in cycles, by action.

The TPU compiler writes an estimate beside every instruction that its cost model knows. They are
summed over loops, whose lengths are in the text or follow from their conditions, and kept apart by
branch: on each tick every device takes the branch of its own action.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator

from jaxpipe.pipeline.compiled.hlo import Computation, Instruction, Module, visits

# Instructions that certainly take time; without an estimate they make a sum too small.
_HEAVY = frozenset(("fusion", "convolution", "dot", "custom-call", "scatter", "sort", "copy"))
_LARGE = 8192  # elements; what is smaller takes no time that anyone would miss


@dataclasses.dataclass(frozen=True)
class Cost:
  """Estimated cycles.

  Attributes:
    least: where every conditional takes its cheapest branch.
    most: where every conditional takes its dearest branch.
    unknown: heavy instructions without an estimate, and loops without a known length (they count
      as one iteration): the figures are too small by these.
  """

  least: int = 0
  most: int = 0
  unknown: int = 0

  @classmethod
  def sum(cls, costs: Iterable[Cost]) -> Cost:
    """One after the other."""
    parts = list(costs)
    return cls(*(sum(getattr(c, f.name) for c in parts) for f in dataclasses.fields(cls)))

  def times(self, count: int) -> Cost:
    """The same work again and again; what is unknown stays one unknown."""
    return Cost(self.least * count, self.most * count, self.unknown)


@dataclasses.dataclass(frozen=True)
class Branch:
  """One branch of a conditional that stands in no other: an action, or its absence.

  Attributes:
    conditional, index: which branch of which conditional.
    scope: the name scope that most of it comes from, of those asked for; None if none.
    in_loop: whether the conditional stands in a loop.
    cost: of one execution.
  """

  conditional: str
  index: int
  scope: str | None
  in_loop: bool
  cost: Cost


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop that stands in no other.

  Attributes:
    name, trips: iterations, None if unknown.
    outside: cost of one iteration without its conditionals: what every tick pays.
  """

  name: str
  trips: int | None
  outside: Cost


class Estimates:
  """Costs of the instructions and computations of one program; each is summed once."""

  def __init__(self, module: Module):
    self._module = module
    self._known: dict[str, Cost] = {}

  def of(self, one: Instruction) -> Cost:
    """Cost of an instruction, with all that it runs."""
    inner = [self.of_computation(name) for name in one.runs]
    if one.opcode == "while":
      trips = trip_count(self._module, one)
      total = Cost.sum(inner).times(1 if trips is None else trips)
      return Cost.sum([total, Cost(unknown=int(trips is None))])
    if one.opcode == "conditional" and inner:
      least, most = min(c.least for c in inner), max(c.most for c in inner)
      return Cost(least, most, max(c.unknown for c in inner))
    own = one.cycles or 0
    silent = one.cycles is None and one.opcode in _HEAVY and one.target != "AllocateBuffer"
    large = any(shape.size >= _LARGE for shape in one.shapes)
    return Cost.sum([Cost(own, own, int(silent and large)), *inner])

  def of_computation(self, name: str) -> Cost:
    """Cost of running a computation once."""
    if name not in self._known:
      self._known[name] = Cost.sum(self.of(one) for one in self._module[name])
    return self._known[name]


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Iterations of a `while`, None if unknown.

  Where the text does not say, the condition does: JAX's loops of known length count from 0, and go
  on while the counter is less than a constant.
  """
  if loop.trips is not None:
    return loop.trips
  condition = module[next(name for role, name in loop.called if role == "condition")]
  root = condition.root
  bounds = [_constant(condition, name) for name in root.operands]
  if root.opcode == "fusion":
    inner = module[next(name for role, name in root.called if role == "calls")].root
    bounds = bounds if inner.opcode == "compare" else []
  elif root.opcode != "compare":
    return None
  known = [bound for bound in bounds if bound is not None]
  return known[0] if len(known) == 1 else None


def _constant(where: Computation, name: str) -> int | None:
  """Value of an integer constant, through copies."""
  one = where.instructions.get(name)
  while one is not None and one.opcode in ("copy", "bitcast"):
    one = where.instructions.get(one.operands[0])
  literal = one.literal if one is not None and one.opcode == "constant" else ""
  return int(literal) if literal.isdecimal() else None


def branches(module: Module, scopes: Collection[str] = ()) -> Iterator[Branch]:
  """Yields the branches of every conditional that stands in no other.

  Args:
    module: the program.
    scopes: see `Branch.scope`.
  """
  estimates = Estimates(module)
  for visit in visits(module):
    one = visit.instruction
    if one.opcode != "conditional" or visit.conditional:
      continue
    for index, name in enumerate(one.runs):
      scope = _scope(module, name, scopes)
      cost = estimates.of_computation(name)
      yield Branch(one.name, index, scope, visit.loops > 0, cost)


def _scope(module: Module, name: str, scopes: Collection[str]) -> str | None:
  """The scope that most of a computation's cycles, or where there are none instructions, bear."""
  votes: collections.Counter[str] = collections.Counter()
  for visit in visits(dataclasses.replace(module, entry=name)):
    path = visit.instruction.op_name.split("/")
    scope = next((part for part in path if part in scopes), None)
    if scope is not None:
      votes[scope] += 1 + (visit.instruction.cycles or 0)
  return votes.most_common(1)[0][0] if votes else None


def loops(module: Module) -> Iterator[Loop]:
  """Yields the loops that stand in no other, and in no conditional."""
  estimates = Estimates(module)
  for visit in visits(module):
    one = visit.instruction
    if one.opcode != "while" or visit.loops or visit.conditional:
      continue
    body = [i for name in one.runs for i in module[name] if i.opcode != "conditional"]
    yield Loop(one.name, trip_count(module, one), Cost.sum(map(estimates.of, body)))


def outside_loops(module: Module) -> Cost:
  """Cost of what runs once a step: what stands in no loop, and in no conditional."""
  estimates = Estimates(module)
  once = (v.instruction for v in visits(module) if not (v.loops or v.conditional))
  return Cost.sum(estimates.of(i) for i in once if not i.runs)
