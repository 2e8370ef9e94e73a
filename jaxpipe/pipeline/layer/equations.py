"""Slices of a list of equations: those that some outputs need, given variables that are known.

JAX has dead-code elimination of its own, but not under a public name, and it keeps or drops whole
outputs. Dividing a backward pass in two needs another question: which equations are left once the
values of *these* variables are known? For `z = sin(x) * y`:

    needed([z], equations, {x, y})         ──▶  [a = sin x;  z = mul a y]
    needed([z], equations, {a, y})         ──▶  [z = mul a y]
    depends(equations, [x])                ──▶  {x, a, z}
    used([z = mul a y])                    ──▶  [a, y]
    evaluate([z = mul a y], {a, y}, [z])   ──▶  the value of z
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxpipe.pipeline.layer.interpret import Equation, Var, bind, read
from jaxpipe.pipeline.layer.varying import axes_of, axes_of_types, bind_varying


def needed(
  outputs: Iterable[Any], equations: Sequence[Equation], known: set[Var]
) -> list[Equation]:
  """Returns the equations that compute `outputs` from the variables in `known`.

  Args:
    outputs: variables, and literals, which need nothing.
    equations: of one jaxpr, in its order.
    known: variables whose values are at hand; what they are computed from is not needed.

  Returns:
    Those of `equations`, in their order. An equation with several outputs is kept whole if one of
    them is needed.
  """
  missing = {v for v in outputs if isinstance(v, Var) and v not in known}
  kept = []
  # Backwards, so that every reader of a variable is met before the equation that makes it.
  for equation in reversed(equations):
    if not missing.isdisjoint(equation.outvars):
      kept.append(equation)
      missing.update(v for v in equation.invars if isinstance(v, Var) and v not in known)
  return kept[::-1]


def depends(equations: Sequence[Equation], sources: Iterable[Var]) -> set[Var]:
  """Returns all variables whose value can change with one of `sources`, themselves included.

  Args:
    equations: in the order in which they run.
    sources: inputs or intermediate variables.
  """
  reached = set(sources)
  for equation in equations:
    if any(isinstance(v, Var) and v in reached for v in equation.invars):
      reached.update(equation.outvars)
  return reached


def evaluate(
  equations: Sequence[Equation], values: dict[Var, Any], outputs: Sequence[Any]
) -> list[Any]:
  """Runs `equations` on the values of their inputs and returns the values of `outputs`.

  Args:
    equations: in the order in which they run.
    values: variable -> array, of everything that the equations or `outputs` read and the equations
      do not compute.
    outputs: variables and literals.
  """
  values = dict(values)
  for equation in equations:
    args = [read(values, v) for v in equation.invars]
    # A sum over a mesh axis does not vary along it when it is traced. Saved for a later action it
    # lies in a pool, whose type varies over all axes, and comes back varying more than the equation
    # was traced for; then so does everything that is computed from it.
    known = axes_of(args) <= axes_of_types(v.aval for v in equation.invars)
    outs = (bind if known else bind_varying)(equation, args)
    values.update(zip(equation.outvars, outs, strict=True))
  return [read(values, v) for v in outputs]


def used(equations: Sequence[Equation], outputs: Iterable[Any] = ()) -> list[Var]:
  """Returns the variables that the equations, or `outputs`, read: each once, in order of first use.

  Args:
    equations: in the order in which they run.
    outputs: variables and literals that are read after the last equation.
  """
  reads = [v for equation in equations for v in equation.invars] + list(outputs)
  return list(dict.fromkeys(v for v in reads if isinstance(v, Var)))
