"""Runs over a mesh what was traced off it: the types of loops and branches are made to agree.

Inside `shard_map` every value has a type that says over which mesh axes it varies. JAX wants a
loop's carry to have one type before and after, and a conditional's branches to return the same
types. Here all that an equation reads is cast to vary over the union of the axes, and so is all
that a body or branch returns. Casting up changes no value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax import lax

from jaxpipe.pipeline.layer.interpret import Equation, bind, bodies, opened, run

Axes = frozenset[str]

# Equations that name a mesh axis and send nothing along it.
_SILENT = {"pvary", "pcast", "axis_index"}


def bind_varying(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  """The rule for an equation that was traced on values that do not vary."""
  axes = axes_of(args)
  if not axes:
    return bind(equation, args)
  rule = {"scan": _scan, "while": _while, "cond": _cond, "pvary": _pvary}.get(
    equation.primitive.name, bind
  )
  # An equation with a jaxpr of its own (a linear solver) may not know that its outputs vary.
  return vary(rule(equation, vary(args, axes)), axes)


def axes_of(values: Iterable[Any]) -> Axes:
  """The mesh axes over which any of the values varies."""
  return axes_of_types(map(jax.typeof, values))


def axes_of_types(types: Iterable[Any]) -> Axes:
  """The mesh axes over which any value of these types varies."""
  return frozenset().union(*(kind.manual_axis_type.varying for kind in types))


def vary(tree: Any, axes: Collection[str]) -> Any:
  """The tree, each leaf varying over the mesh `axes` at least.

  Parameters are cast once, before the loop: one that stayed *invariant* along `data` would have its
  gradient reduced over it at every use, once a microbatch, in place of once a step.
  """

  def mark(leaf: Any) -> Any:
    missing = tuple(sorted(set(axes) - axes_of([leaf])))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(mark, tree)


def unvarying(leaf: Any) -> jax.ShapeDtypeStruct:
  """A stand-in of the same shape and dtype that does not vary."""
  kind = jax.typeof(leaf)
  return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def collectives(jaxpr: Any) -> Iterator[tuple[str, frozenset[str]]]:
  """Equations, here and in bodies and branches, that communicate: name, and over which axes."""
  for equation in opened(jaxpr).eqns:
    named = (_each(equation.params.get(k)) for k in ("axes", "axis_name"))
    axes = frozenset(axis for names in named for axis in names if isinstance(axis, str))
    if axes and equation.primitive.name not in _SILENT:
      yield str(equation.primitive.name), axes
    for inner in bodies(equation):
      yield from collectives(inner)


def _scan(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  body = equation.params["jaxpr"]
  # Counted by their dims: what is scanned over has one less inside. The parameters that say so
  # differ between versions of JAX.
  n_xs = _unlike(equation.invars, opened(body).invars)
  n_carry = len(equation.outvars) - _unlike(equation.outvars, opened(body).outvars)
  n_consts = len(args) - n_xs - n_carry
  consts, carry, xs = args[:n_consts], args[n_consts : len(args) - n_xs], args[len(args) - n_xs :]
  inner = _inner(body, axes_of(args))

  def step(carry: Any, xs: Any) -> tuple[Any, Any]:
    out = inner(*consts, *carry, *xs)
    return out[:n_carry], out[n_carry:]

  same = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
  carry, ys = lax.scan(step, list(carry), list(xs), **same)
  return [*carry, *ys]


def _while(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  params, axes = equation.params, axes_of(args)
  n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
  cond, body = _inner(params["cond_jaxpr"], axes), _inner(params["body_jaxpr"], axes)
  of_cond, of_body, carry = args[:n_cond], args[n_cond : n_cond + n_body], args[n_cond + n_body :]
  return lax.while_loop(
    lambda carry: cond(*of_cond, *carry)[0], lambda carry: body(*of_body, *carry), list(carry)
  )


def _cond(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  branches = [_inner(branch, axes_of(args)) for branch in equation.params["branches"]]
  return lax.switch(args[0], branches, *args[1:])


def _pvary(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  # Of what varies along an axis already, JAX refuses to be told so again.
  varied: Sequence[Any] = vary(args, equation.params["axes"])
  return varied


def _inner(jaxpr: Any, axes: Axes) -> Callable[..., list[Any]]:
  """A body or branch as a function whose outputs all vary over `axes`."""
  return lambda *args: vary(run(jaxpr, args, bind_varying), axes)


def _unlike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  """How many variables have more dims outside a loop than inside."""
  return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _each(value: Any) -> Sequence[Any]:
  return value if isinstance(value, tuple | list) else [value]
