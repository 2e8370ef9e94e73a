"""Walks the equations of a jaxpr and of the jaxprs inside its equations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

# What the body of a loop passes on, it passes on to its next turn and not to the loop's outputs.
_LOOPS = ("scan", "while")


def equations(jaxpr: Any) -> Iterator[Any]:
  """Yields all equations in order, those of inner jaxprs behind the equation that holds them.

  Args:
    jaxpr: a `Jaxpr` or `ClosedJaxpr`.
  """
  for eqn in opened(jaxpr).eqns:
    yield eqn
    for inner in inner_jaxprs(eqn):
      yield from equations(inner)


def constants(jaxpr: Any) -> Iterator[Any]:
  """Yields the arrays that a closed jaxpr, or one inside it, brings along."""
  yield from getattr(jaxpr, "consts", ())
  for eqn in opened(jaxpr).eqns:
    for inner in inner_jaxprs(eqn):
      yield from constants(inner)


def inner_jaxprs(eqn: Any) -> list[Any]:
  """The jaxprs among an equation's parameters, such as the body of a loop."""
  return [p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(p)]


def is_jaxpr(value: Any) -> bool:
  """Whether a parameter of an equation is a jaxpr, closed or open."""
  return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def opened(jaxpr: Any) -> Any:
  """The jaxpr with equations inside a closed one; an open one itself."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def passed_through(jaxpr: Any) -> list[int | None]:
  """For every output of a jaxpr, the number of the input that it is, or None where it is computed.

  Calls such as `jit` and `checkpoint` are looked into: they return what they only pass on as
  variables of their own.

  Args:
    jaxpr: a `Jaxpr` or `ClosedJaxpr`.
  """
  jaxpr = opened(jaxpr)
  source: dict[Any, int] = {v: n for n, v in enumerate(jaxpr.invars)}
  for eqn in jaxpr.eqns:
    inner = inner_jaxprs(eqn)
    if len(inner) != 1 or len(opened(inner[0]).invars) != len(eqn.invars):
      continue
    if eqn.primitive.name in _LOOPS or len(opened(inner[0]).outvars) != len(eqn.outvars):
      continue
    for out, n in zip(eqn.outvars, passed_through(inner[0]), strict=True):
      given = None if n is None else eqn.invars[n]
      if given is not None and not isinstance(given, core.Literal) and given in source:
        source[out] = source[given]
  return [None if isinstance(v, core.Literal) else source.get(v) for v in jaxpr.outvars]
