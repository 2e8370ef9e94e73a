"""Sums the compiler's estimates of cycles, by branch and by loop.

The TPU compiler writes an estimate beside every instruction that its cost model knows:

    %dot.3 = bf16[2,8]{1,0} fusion(%p), kind=kOutput, calls=%fused, backend_config={
      "window_config":{"estimated_cycles":"100"}}

They are summed over loops, whose lengths are in the text or follow from their conditions, and kept
separate by branch of the outermost conditionals, since on each tick a device takes the branch of
its own action. Programs for CPU have no estimates: their sums are 0, with a count of what is
unknown.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator

from jaxpipe.pipeline.compiled.hlo import Computation, HloModule, Instruction
from jaxpipe.pipeline.compiled.walk import visits

# Opcodes that certainly take time: without an estimate of them a sum is too small.
_HEAVY = frozenset(("fusion", "convolution", "dot", "custom-call", "scatter", "sort", "copy"))
# Elements of a result below which a heavy instruction takes negligible time.
_LARGE = 8192


@dataclasses.dataclass(frozen=True)
class Cost:
  """Estimated cycles of a piece of the program.

  Attributes:
    least: cycles if every conditional takes its cheapest branch.
    most: cycles if every conditional takes its most expensive branch.
    unknown: number of heavy instructions without an estimate (counted as 0 cycles) and of loops
      without a known length (counted as one iteration). If it is not 0, `least` and `most` are too
      small.
  """

  least: int = 0
  most: int = 0
  unknown: int = 0

  @classmethod
  def sum(cls, costs: Iterable[Cost]) -> Cost:
    """Returns the cost of doing all of these, one after the other."""
    parts = list(costs)
    return cls(*(sum(getattr(c, f.name) for c in parts) for f in dataclasses.fields(cls)))

  def times(self, count: int) -> Cost:
    """Returns the cost of `count` repetitions; an unknown instruction still counts once."""
    return Cost(self.least * count, self.most * count, self.unknown)


@dataclasses.dataclass(frozen=True)
class Branch:
  """One branch of a conditional that is in no other conditional: an action, or its absence.

  Attributes:
    conditional: name of the conditional.
    index: number of the branch, from 0.
    scope: the name scope that most of the branch was traced under, of those asked for; None if it
      was traced under none of them.
    in_loop: whether the conditional is in a loop.
    cost: of one execution of the branch.
  """

  conditional: str
  index: int
  scope: str | None
  in_loop: bool
  cost: Cost


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop that is in no other loop and in no conditional, such as the loop over the ticks.

  Attributes:
    name: of the `while` instruction.
    trips: number of iterations; None if unknown.
    outside: cost of one iteration without its conditionals, which every tick pays on every device.
  """

  name: str
  trips: int | None
  outside: Cost


class Estimates:
  """Costs of the instructions and computations of one program; each computation is summed once."""

  def __init__(self, module: HloModule):
    self._module = module
    self._known: dict[str, Cost] = {}

  def of(self, instruction: Instruction) -> Cost:
    """Returns the cost of an instruction, including the computations that it runs."""
    inner = [self.of_computation(name) for name in instruction.runs]
    if instruction.opcode == "while":
      trips = trip_count(self._module, instruction)
      total = Cost.sum(inner).times(1 if trips is None else trips)
      return Cost.sum([total, Cost(unknown=int(trips is None))])
    if instruction.opcode == "conditional" and inner:
      # Of the branches one runs, and which one is known only when the program runs.
      least, most = min(c.least for c in inner), max(c.most for c in inner)
      return Cost(least, most, max(c.unknown for c in inner))
    # A call's own estimate and those of what it runs; a fusion has only its own.
    own = instruction.cycles or 0
    return Cost.sum([Cost(own, own, int(_is_unknown(instruction))), *inner])

  def of_computation(self, name: str) -> Cost:
    """Returns the cost of running a computation once."""
    if name not in self._known:
      self._known[name] = Cost.sum(self.of(one) for one in self._module[name])
    return self._known[name]


def _is_unknown(instruction: Instruction) -> bool:
  """Whether an instruction takes time about which the text says nothing."""
  # `lax.empty` is a custom call on TPU, which reserves memory and does nothing.
  silent = instruction.cycles is None and instruction.target != "AllocateBuffer"
  large = any(shape.size >= _LARGE for shape in instruction.shapes)
  return silent and large and instruction.opcode in _HEAVY


def trip_count(module: HloModule, loop: Instruction) -> int | None:
  """Returns the number of iterations of a `while`, None if it is unknown.

  Where the text does not say it, the condition does: JAX's loops of known length count from 0 and
  go on while the counter is less than a constant. The comparison may be fused:

      %n = s32[] constant(4)                  %n = s32[] constant(4)
      ROOT %c = pred[] compare(%i, %n)        ROOT %c = pred[] fusion(%i, %n), calls=%compare
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
  # With two constants, or none, the condition is not of this form.
  return known[0] if len(known) == 1 else None


def _constant(computation: Computation, name: str) -> int | None:
  """Value of the integer constant that an instruction is, or copies; None if it is no constant."""
  found = computation.instructions.get(name)
  while found is not None and found.opcode in ("copy", "bitcast"):
    found = computation.instructions.get(found.operands[0])
  literal = found.literal if found is not None and found.opcode == "constant" else ""
  return int(literal) if literal.isdecimal() else None


def branches(module: HloModule, scopes: Collection[str] = ()) -> Iterator[Branch]:
  """Yields the branches of every conditional that is in no other conditional.

  Args:
    module: the program.
    scopes: name scopes by which branches are to be told apart; see `Branch.scope`.
  """
  estimates = Estimates(module)
  for visit in visits(module):
    conditional = visit.instruction
    if conditional.opcode != "conditional" or visit.conditional:
      continue
    for index, name in enumerate(conditional.runs):
      scope = _scope(module, name, scopes)
      cost = estimates.of_computation(name)
      yield Branch(conditional.name, index, scope, visit.loops > 0, cost)


def _scope(module: HloModule, name: str, scopes: Collection[str]) -> str | None:
  """The scope under which most of a computation was traced; None if under none of `scopes`.

  Every scheduled instruction votes for its scope, with its cycles and one more, so that without
  estimates the number of instructions decides.
  """
  votes: collections.Counter[str] = collections.Counter()
  for visit in visits(dataclasses.replace(module, entry=name)):
    path = visit.instruction.op_name.split("/")
    scope = next((part for part in path if part in scopes), None)
    if scope is not None:
      votes[scope] += 1 + (visit.instruction.cycles or 0)
  return votes.most_common(1)[0][0] if votes else None


def loops(module: HloModule) -> Iterator[Loop]:
  """Yields the loops that are in no other loop and in no conditional."""
  estimates = Estimates(module)
  for visit in visits(module):
    loop = visit.instruction
    if loop.opcode != "while" or visit.loops or visit.conditional:
      continue
    # The conditionals hold the actions, whose costs `branches` gives one by one.
    body = [i for name in loop.runs for i in module[name] if i.opcode != "conditional"]
    yield Loop(loop.name, trip_count(module, loop), Cost.sum(map(estimates.of, body)))


def outside_loops(module: HloModule) -> Cost:
  """Returns the cost of what runs once in a step: all that is in no loop and in no conditional."""
  estimates = Estimates(module)
  once = (v.instruction for v in visits(module) if not (v.loops or v.conditional))
  # An instruction that runs computations is a loop, a conditional or a call, whose instructions are
  # visited by themselves.
  return Cost.sum(estimates.of(i) for i in once if not i.runs)
