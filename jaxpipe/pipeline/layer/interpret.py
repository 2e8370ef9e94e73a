"""Runs a jaxpr one equation at a time, by whatever rule the caller has for an equation.

Two rules are in use: `bind` runs an equation as it was traced, `varying.bind_varying` runs it on
values that vary over mesh axes, though it was traced on values that do not. Run under a trace, a
rule writes its equations into the new jaxpr, which is how calls are expanded (`trace.trace`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core

Var = core.Var
Equation = core.JaxprEqn
# Gives the outputs of one equation, given the values of its inputs.
Rule = Callable[[Equation, Sequence[Any]], Sequence[Any]]

# Equations that only call another jaxpr. Left whole, a rematerialized layer's entire backward pass
# would be one equation, all of it would be needed for dx, and nothing would remain for W. The names
# are those of all JAX versions in use.
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

# The primitive that `jax.ad_checkpoint.checkpoint_name` leaves.
_NAMING = "name"


def bind(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  """Runs an equation on the values of its inputs just as it was traced."""
  params = equation.primitive.get_bind_params(equation.params)
  with equation.ctx.manager:
    out = equation.primitive.bind(*args, **params)
  return out if equation.primitive.multiple_results else [out]


def run(jaxpr: Any, args: Sequence[Any], rule: Rule = bind) -> list[Any]:
  """Runs a jaxpr and returns the values of its outputs.

  Args:
    jaxpr: closed, or open without constants. The equations of a call are run in the call's place.
    args: values of its inputs.
    rule: runs one equation that is not a call.
  """
  consts = getattr(jaxpr, "consts", ())
  jaxpr = opened(jaxpr)
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  for equation in jaxpr.eqns:
    ins = [read(values, v) for v in equation.invars]
    if equation.primitive.name == _NAMING:
      # Names tell a residual policy what to keep, which is over once a function is traced. As an
      # equation of its own, a name would make a second variable of one value, kept twice.
      outs: Sequence[Any] = ins
    elif (inner := called(equation)) is None:
      outs = rule(equation, ins)
    else:
      outs = run(inner, ins, rule)
    values.update(zip(equation.outvars, outs, strict=True))
  return [read(values, v) for v in jaxpr.outvars]


def read(values: dict[Var, Any], v: Any) -> Any:
  """Returns the value of `v`: from `values` for a variable, its own for a literal."""
  return values[v] if isinstance(v, Var) else v.val


def opened(jaxpr: Any) -> Any:
  """Returns a jaxpr without its constants; JAX 0.12 has one class for both, JAX 0.10 has two."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def bodies(equation: Equation) -> Iterator[Any]:
  """Yields the jaxprs that an equation runs: a loop's body, a conditional's branches, a call's."""
  for value in equation.params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if hasattr(opened(one), "eqns"):
        yield opened(one)


def called(equation: Equation) -> Any:
  """Returns the jaxpr that a call-like equation calls, or None for any other equation."""
  if equation.primitive.name not in _CALLS:
    return None
  return next(equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params)
