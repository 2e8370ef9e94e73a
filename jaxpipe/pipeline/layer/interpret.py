"""Runs a jaxpr one equation at a time, by whatever rule the caller has for an equation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core

Var = core.Var
Equation = core.JaxprEqn
# How one equation gives its outputs, given the values of its inputs.
Rule = Callable[[Equation, Sequence[Any]], Sequence[Any]]

# Equations that only call another jaxpr. Left whole, a rematerialized layer's entire backward pass
# would be one equation, all of it would be needed for dx, and nothing would remain for W.
_CALLS = {
  "jit",
  "pjit",
  "closed_call",
  "eval_jaxpr",
  "core_call",
  "checkpoint",
  "remat2",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "custom_lin",
  "vjp_node",
}

_NAMING = "name"


def bind(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  """The rule that changes nothing."""
  params = equation.primitive.get_bind_params(equation.params)
  with equation.ctx.manager:
    out = equation.primitive.bind(*args, **params)
  return out if equation.primitive.multiple_results else [out]


def run(jaxpr: Any, args: Sequence[Any], rule: Rule = bind) -> list[Any]:
  """Runs a closed jaxpr; the equations of a call are run in the place of the call.

  Names given with `checkpoint_name` are left out. They tell a policy what to keep, which is over
  once a function is traced, and as variables of their own they would be kept twice.
  """
  consts = getattr(jaxpr, "consts", ())
  jaxpr = opened(jaxpr)
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  for equation in jaxpr.eqns:
    ins = [read(values, v) for v in equation.invars]
    if equation.primitive.name == _NAMING:
      outs: Sequence[Any] = ins
    elif (inner := _called(equation)) is None:
      outs = rule(equation, ins)
    else:
      outs = run(inner, ins, rule)
    values.update(zip(equation.outvars, outs, strict=True))
  return [read(values, v) for v in jaxpr.outvars]


def read(values: dict[Var, Any], v: Any) -> Any:
  """The value of a variable or literal."""
  return values[v] if isinstance(v, Var) else v.val


def opened(jaxpr: Any) -> Any:
  """The jaxpr without its constants; jax 0.12 has one class for both kinds, jax 0.10 two."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def bodies(equation: Equation) -> Iterator[Any]:
  """The jaxprs that an equation runs: of a loop, of the branches of a conditional, of a call."""
  for value in equation.params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if hasattr(opened(one), "eqns"):
        yield opened(one)


def _called(equation: Equation) -> Any:
  """The jaxpr that a call-like equation calls, or None for any other equation."""
  if equation.primitive.name not in _CALLS:
    return None
  return next(equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params)
