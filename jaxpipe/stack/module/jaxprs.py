"""Walks the equations of a jaxpr and of the jaxprs inside its equations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


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
