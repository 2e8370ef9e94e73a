"""Slices of a jaxpr: which equations some values need, given others, and running just those.

JAX has dead-code elimination of its own, but not as a public name, and it keeps or drops whole
outputs; cutting a backward pass in two needs the question "what is left once these are known?".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

Var = core.Var
Equation = core.JaxprEqn

# Equations that only call another jaxpr. Left whole, a rematerialized layer's entire backward pass
# would be one equation, all of it would be needed for dx, and nothing would remain for W.
_CALLS = {
  "jit",
  "pjit",
  "closed_call",
  "core_call",
  "checkpoint",
  "remat2",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "custom_lin",
  "vjp_node",
}


def trace(function: Callable[..., Any], *args: Any) -> Any:
  """Returns the closed jaxpr of `function(*args)` with every call-like equation expanded."""
  closed = jax.make_jaxpr(function)(*args)
  flat = lambda *leaves: _run_expanded(_open(closed), _consts(closed), leaves)  # noqa: E731
  return jax.make_jaxpr(flat)(*jax.tree.leaves(args))


def needed(
  outputs: Iterable[Any], equations: Sequence[Equation], known: set[Var]
) -> list[Equation]:
  """Equations, in order, that compute `outputs` from the variables in `known`."""
  missing = {v for v in outputs if isinstance(v, Var) and v not in known}
  kept = []
  for equation in reversed(equations):
    if not missing.isdisjoint(equation.outvars):
      kept.append(equation)
      missing.update(v for v in equation.invars if isinstance(v, Var) and v not in known)
  return kept[::-1]


def depends(equations: Sequence[Equation], sources: Iterable[Var]) -> set[Var]:
  """All variables whose value can change with one of `sources`, themselves included."""
  reached = set(sources)
  for equation in equations:
    if any(isinstance(v, Var) and v in reached for v in equation.invars):
      reached.update(equation.outvars)
  return reached


def evaluate(
  equations: Sequence[Equation], values: dict[Var, Any], outputs: Sequence[Any]
) -> list[Any]:
  """Runs `equations` on the values of their inputs and returns those of `outputs`."""
  values = dict(values)
  for equation in equations:
    args = [_read(values, v) for v in equation.invars]
    values.update(zip(equation.outvars, _bind(equation, args), strict=True))
  return [_read(values, v) for v in outputs]


def used(equations: Sequence[Equation], outputs: Iterable[Any] = ()) -> list[Var]:
  """Variables that the equations, or `outputs`, read; each once, in order of first use."""
  reads = [v for equation in equations for v in equation.invars] + list(outputs)
  return list(dict.fromkeys(v for v in reads if isinstance(v, Var)))


def _read(values: dict[Var, Any], v: Any) -> Any:
  return values[v] if isinstance(v, Var) else v.val


def _bind(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  params = equation.primitive.get_bind_params(equation.params)
  with equation.ctx.manager:
    out = equation.primitive.bind(*args, **params)
  return out if equation.primitive.multiple_results else [out]


def _run_expanded(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values.update(zip(jaxpr.invars, args, strict=True))
  for equation in jaxpr.eqns:
    ins = [_read(values, v) for v in equation.invars]
    inner = _called(equation)
    outs = (
      _bind(equation, ins) if inner is None else _run_expanded(_open(inner), _consts(inner), ins)
    )
    values.update(zip(equation.outvars, outs, strict=True))
  return [_read(values, v) for v in jaxpr.outvars]


def _called(equation: Equation) -> Any:
  """The jaxpr that a call-like equation calls, or None."""
  if equation.primitive.name not in _CALLS:
    return None
  return next((equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params), None)


# jax 0.12 has one class for open and closed jaxprs, jax 0.10 two.
def _open(jaxpr: Any) -> Any:
  return getattr(jaxpr, "jaxpr", jaxpr)


def _consts(jaxpr: Any) -> Sequence[Any]:
  return getattr(jaxpr, "consts", ())
