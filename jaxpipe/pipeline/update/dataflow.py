"""A transformation traced on one leaf per variable, as a list of operations over numbered values.

Calls are expanded, equal operations are one, and each value knows which variables it depends on. A
conditional over several variables at once, such as that of `optax.MultiSteps`, is both of its
branches and a selection for each result, so that each result depends on its own variable again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxpipe.pipeline.layer.interpret import Var, bind, called, opened


@dataclasses.dataclass(frozen=True)
class Constant:
  """A constant operand of an operation.

  Attributes:
    text: its value and type, by which constants are compared.
    value: the value.
  """

  text: str
  value: Any = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """One equation.

  Attributes:
    name: of the primitive.
    text: primitive, parameters and types; operations with equal texts compute the same of the same.
    params: of the primitive.
    run: values of `ins` -> values of `outs`.
    ins: what it reads.
    outs: numbers of the values that it makes.
  """

  name: str
  text: str
  params: dict[str, Any]
  run: Callable[..., Sequence[Any]]
  ins: tuple[Any, ...]
  outs: tuple[int, ...]


class Flow:
  """Operations in order, over values that are numbered from 0.

  Attributes:
    operations: in order.
    avals: shape and dtype of each value.
    depends: for each value, a bit for each variable that it depends on.
    given: values that are known from the start, number -> array.
    makers: value -> the operation that makes it; inputs and given values have none.
  """

  def __init__(self) -> None:
    self.operations: list[Operation] = []
    self.avals: list[Any] = []
    self.depends: list[int] = []
    self.given: dict[int, Any] = {}
    self.makers: dict[int, Operation] = {}
    self._made: dict[tuple[str, tuple[Any, ...]], tuple[int, ...]] = {}
    self._given_numbers: dict[int, int] = {}

  def value(self, aval: Any, depends: int) -> int:
    """A new value; returns its number."""
    self.avals.append(aval)
    self.depends.append(depends)
    return len(self.avals) - 1

  def trace(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    """Adds the operations of a jaxpr.

    Args:
      jaxpr: closed, or open without constants.
      inputs: values or constants for its inputs.

    Returns:
      The values or constants of its outputs.
    """
    consts = [self._const(const) for const in getattr(jaxpr, "consts", ())]
    jaxpr = opened(jaxpr)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    for equation in jaxpr.eqns:
      ins = [self._read(env, v) for v in equation.invars]
      outs = self._equation(equation, ins)
      env.update(zip(equation.outvars, outs, strict=True))
    return [self._read(env, v) for v in jaxpr.outvars]

  def depends_on(self, ref: Any) -> int:
    """A bit for each variable that a value or constant depends on."""
    return self.depends[ref] if isinstance(ref, int) else 0

  def _read(self, env: dict[Var, Any], v: Any) -> Any:
    if isinstance(v, Var):
      return env[v]
    return Constant(f"{v.aval.str_short()}:{v.val!r}", v.val)

  def _const(self, const: Any) -> int:
    """The number of an array that the traced function has closed over."""
    if id(const) not in self._given_numbers:
      array = const if isinstance(const, jax.Array) else np.asarray(const)
      number = self.value(jax.typeof(array), 0)
      self._given_numbers[id(const)], self.given[number] = number, const
    return self._given_numbers[id(const)]

  def _equation(self, equation: Any, ins: list[Any]) -> list[Any]:
    inner = called(equation)
    if inner is not None:
      return self.trace(inner, ins)
    if equation.primitive.name == "cond":
      reached = 0
      for ref in ins:
        reached |= self.depends_on(ref)
      if reached.bit_count() > 1:
        return self._selected(equation, ins)
    text = f"{equation.primitive.name} {_text(equation.params)}"
    avals = [v.aval for v in equation.outvars]

    def run(*args: Any) -> Sequence[Any]:
      return bind(equation, args)

    return self.add(equation.primitive.name, text, equation.params, run, ins, avals)

  def _selected(self, equation: Any, ins: list[Any]) -> list[Any]:
    """All branches of a conditional, and for each result a selection by its index."""
    index, *operands = ins
    branches = [self.trace(branch, operands) for branch in equation.params["branches"]]
    outs: list[Any] = []
    for v, *cases in zip(equation.outvars, *branches, strict=True):
      if all(case == cases[0] for case in cases):
        outs.append(cases[0])
      else:
        refs = [index, *cases]
        outs += self.add("select_n", f"select_n {len(cases)}", {}, _select, refs, [v.aval])
    return outs

  def add(
    self,
    name: str,
    text: str,
    params: dict[str, Any],
    run: Callable[..., Sequence[Any]],
    ins: Sequence[Any],
    avals: Sequence[Any],
  ) -> list[Any]:
    """Adds one operation, or finds the equal one that is there; returns its results."""
    text = f"{text} -> {' '.join(aval.str_short() for aval in avals)}"
    made = self._made.get((text, tuple(ins)))
    if made is None:
      reached = 0
      for ref in ins:
        reached |= self.depends_on(ref)
      made = tuple(self.value(aval, reached) for aval in avals)
      operation = Operation(name, text, params, run, tuple(ins), made)
      self.operations.append(operation)
      self.makers.update(dict.fromkeys(made, operation))
      self._made[text, tuple(ins)] = made
    return list(made)


def _select(index: Any, *cases: Any) -> list[Any]:
  """The case of an index, each case of one shape."""
  out = cases[-1]
  for n in range(len(cases) - 2, -1, -1):
    out = lax.select_n(index <= n, out, cases[n])
  return [out]


def _text(params: dict[str, Any]) -> str:
  """The parameters of a primitive in words, equal only where they mean the same."""
  consts = [
    str(id(const))
    for value in params.values()
    for one in (value if isinstance(value, tuple | list) else (value,))
    for const in getattr(one, "consts", ())
  ]
  return " ".join([*(f"{key}={value}" for key, value in sorted(params.items())), *consts])
