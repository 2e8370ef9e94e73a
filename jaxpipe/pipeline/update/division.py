"""The operations of a transformation divided: those of one variable, and those that join variables.

What a variable's own results need of its own arrays is its *local* program. A number that joins
variables, such as a global norm, belongs to the *shared* program, which every device runs. Between
the two only single numbers pass, so that no device needs another's tensors:

    pass 0   local:   sum of squares of each variable        exported, one number each
             shared:  norm = sqrt(sum of all)                imported by all
    last     local:   updates and new state of each variable

Whatever joins whole tensors of several variables is refused here, by the names of both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxpipe.pipeline.update.dataflow import Constant, Flow, Operation

# Values that depend on no variable are computed once for all where they are no larger than this.
_SMALL = 1024

_SHARED = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Local:
  """What is computed for one variable in one pass.

  Attributes:
    variable: its number.
    operations: in order.
    reads: roles of the variable's arrays that are read, role -> value.
    imports: values that the shared program has, in order of first use.
    outs: role of a result -> the value or constant; in a pass before the last, of an export, the
      role is its value's number in the order of exports.
    text: equal for variables whose programs are the same.
  """

  variable: int
  operations: tuple[Operation, ...]
  reads: dict[Any, int]
  imports: tuple[int, ...]
  outs: tuple[tuple[Any, Any], ...]
  text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Division:
  """A transformation, divided.

  Attributes:
    flow: all operations.
    passes: for each pass, the local programs of the variables that have any part in it.
    exports: for each pass but the last, the values that it exports, in order, by variable.
    shared: the operations of the shared program, in order.
    results: the values or constants of the results that belong to no variable.
  """

  flow: Flow
  passes: tuple[tuple[Local, ...], ...]
  exports: tuple[tuple[tuple[int, int], ...], ...]
  shared: tuple[Operation, ...]
  results: tuple[Any, ...]


def divide(
  flow: Flow,
  inputs: dict[int, tuple[int, Any]],
  outs: Sequence[dict[Any, Any]],
  results: Sequence[Any],
  names: Sequence[str],
) -> Division:
  """Divides a transformation.

  Args:
    flow: its operations.
    inputs: value -> variable and role, of the variables' own arrays.
    outs: for each variable, role of a result -> value or constant.
    results: values or constants that belong to no variable.
    names: paths of the variables.

  Raises:
    ValueError: an operation that joins whole tensors of several variables.
  """
  homes = _homes(flow, outs, results)
  crossing, phases = _crossings(flow, homes, outs, results, names)
  last = 1 + max((phases[v] for v in crossing), default=-1)
  exports: list[list[tuple[int, int]]] = [[] for _ in range(last)]
  for v in sorted(crossing):
    exports[phases[v]].append((homes[v], v))
  passes = []
  for k in range(last):
    of_variable: dict[int, dict[Any, Any]] = {}
    for position, (variable, v) in enumerate(exports[k]):
      of_variable.setdefault(variable, {})[position] = v
    passes.append(
      tuple(_local(flow, homes, inputs, i, roles, True) for i, roles in of_variable.items())
    )
  passes.append(tuple(_local(flow, homes, inputs, i, roles) for i, roles in enumerate(outs)))
  wanted = [v for locals_ in passes for one in locals_ for v in one.imports]
  shared = _backward(
    flow, [*wanted, *results], lambda v: homes.get(v, _SHARED) != _SHARED or v in crossing
  )
  return Division(flow, tuple(passes), tuple(map(tuple, exports)), tuple(shared), tuple(results))


def _homes(flow: Flow, outs: Sequence[dict[Any, Any]], results: Sequence[Any]) -> dict[int, int]:
  """For each value that depends on variables, the variable whose program makes it, or `_SHARED`."""
  # Backwards: a bit for each variable whose results need the value, and one for all other results.
  needed = [0] * len(flow.avals)
  for i, roles in enumerate(outs):
    for ref in roles.values():
      if isinstance(ref, int):
        needed[ref] |= 1 << i
  for ref in results:
    if isinstance(ref, int):
      needed[ref] |= 1 << len(outs)
  for operation in reversed(flow.operations):
    bits = 0
    for v in operation.outs:
      bits |= needed[v]
    for ref in operation.ins:
      if isinstance(ref, int):
        needed[ref] |= bits
  homes = {}
  for v, depends in enumerate(flow.depends):
    if not depends:
      continue
    maker = flow.makers.get(v)
    bits = needed[v]
    for other in maker.outs if maker else ():
      bits |= needed[other]
    if depends.bit_count() == 1:
      homes[v] = depends.bit_length() - 1
    elif bits.bit_count() == 1 and bits < 1 << len(outs):
      homes[v] = bits.bit_length() - 1
    else:
      homes[v] = _SHARED
  return homes


def _crossings(
  flow: Flow,
  homes: dict[int, int],
  outs: Sequence[dict[Any, Any]],
  results: Sequence[Any],
  names: Sequence[str],
) -> tuple[set[int], list[int]]:
  """The values that leave their variable's program, and for each value the pass that makes it."""
  crossing: set[int] = set()
  phases = [0] * len(flow.avals)

  def cross(v: int, to: int, by: str) -> None:
    if math.prod(flow.avals[v].shape) != 1:
      where = names[to] if to != _SHARED else "other variables"
      raise ValueError(
        f"the optimizer joins the whole tensor of {names[homes[v]]} with {where} (by {by}), and"
        " variables lie on different devices: only single numbers, such as norms, may couple them;"
        " take a transformation that works variable by variable"
      )
    crossing.add(v)

  def follow(ref: Any, home: int | None, by: str) -> int:
    """The pass from which a reader at `home` can have a value."""
    if not isinstance(ref, int) or ref not in homes:
      return 0
    theirs = homes[ref]
    if theirs == home:
      return phases[ref]
    if theirs == _SHARED:
      return phases[ref] + 1
    cross(ref, _SHARED if home is None else home, by)
    return phases[ref] + (home not in (None, _SHARED))

  for operation in flow.operations:
    home = homes.get(operation.outs[0]) if operation.outs else None
    phase = max((follow(ref, home, operation.name) for ref in operation.ins), default=0)
    for v in operation.outs:
      phases[v] = phase
  for i, roles in enumerate(outs):
    for ref in roles.values():
      follow(ref, i, "the new state")
  for ref in results:
    follow(ref, None, "the new state")
  return crossing, phases


def _backward(flow: Flow, wanted: Iterable[Any], stop: Any) -> list[Operation]:
  """The operations that make these values, in order, but for what `stop` says is at hand."""
  missing = {v for v in wanted if isinstance(v, int) and not stop(v)}
  found: dict[int, Operation] = {}
  todo = list(missing)
  while todo:
    v = todo.pop()
    operation = flow.makers.get(v)
    if operation is None or operation.outs[0] in found:
      continue
    found[operation.outs[0]] = operation
    todo += [ref for ref in operation.ins if isinstance(ref, int) and not stop(ref)]
  # Values are numbered in the order in which they are made.
  return [found[n] for n in sorted(found)]


def _local(
  flow: Flow,
  homes: dict[int, int],
  inputs: dict[int, tuple[int, Any]],
  variable: int,
  roles: dict[Any, Any],
  exporting: bool = False,
) -> Local:
  """The program of one variable that makes the values of `roles`."""

  def imported(v: int) -> bool:
    if v in homes:
      return homes[v] != variable
    return math.prod(flow.avals[v].shape) <= _SMALL or v not in flow.makers

  operations = _backward(flow, roles.values(), imported)
  numbers: dict[int, str] = {}
  imports: list[int] = []
  reads: dict[Any, int] = {}
  words: list[str] = []

  def word(ref: Any) -> str:
    if isinstance(ref, Constant):
      return ref.text
    if ref not in numbers:
      if ref in inputs:
        role = inputs[ref][1]
        reads[role] = ref
        numbers[ref] = f"{role}:{flow.avals[ref].str_short()}"
      else:
        numbers[ref] = f"import{len(imports)}:{flow.avals[ref].str_short()}"
        imports.append(ref)
    return numbers[ref]

  for operation in operations:
    words.append(f"{operation.text} ({' '.join(word(ref) for ref in operation.ins)})")
    for v in operation.outs:
      numbers[v] = f"t{len(numbers)}"
  # An export's role is its place among all, which no two variables share.
  words += [f"{'' if exporting else role}={word(ref)}" for role, ref in roles.items()]
  return Local(
    variable, tuple(operations), reads, tuple(imports), tuple(roles.items()), "\n".join(words)
  )
