"""The types that say over which mesh axes a value varies, and how to run equations traced without.

Inside `jax.shard_map` (with `check_vma=True`) the type of a value holds a set of mesh axes. A value
*varies* over an axis of the set: devices along that axis may hold different arrays. Over any other
axis it is *invariant*: JAX knows that all devices along it hold equal arrays.

    a fresh constant, jnp.zeros(...)             varies over nothing
    a device's shard of the batch                varies over the axes that shard it
    a + b                                        over the axes of a and those of b
    lax.psum(a, "data")                          over the axes of a without "data"
    lax.pcast(a, ("data",), to="varying")        over "data" as well; the array is unchanged

The transpose of that cast is a sum over the axis, so the types also decide where a derivative
communicates (JAX's guide "Manual parallelism with `shard_map`" tells more).

JAX wants a loop's carry to have one type before and after its body, and the branches of a
conditional to return equal types. `bind_varying` runs an equation that was traced off the mesh,
where nothing varies: it casts all that the equation reads to vary over the union of their axes, and
also all that a body or branch returns. Casting changes no value.
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
  """Runs an equation that was traced on values that do not vary.

  Args:
    equation: of any kind but a call.
    args: values of its inputs, varying over any mesh axes.

  Returns:
    Values of its outputs, varying over every axis over which one of `args` varies.
  """
  axes = axes_of(args)
  if not axes:
    return bind(equation, args)
  rule = {"scan": _scan, "while": _while, "cond": _cond, "pvary": _pvary}.get(
    equation.primitive.name, bind
  )
  # The outputs are cast as well: an equation with a jaxpr of its own that is not run here (a linear
  # solver) may not know that they vary.
  return vary(rule(equation, vary(args, axes)), axes)


def axes_of(values: Iterable[Any]) -> Axes:
  """Returns the mesh axes over which any of the values varies."""
  return axes_of_types(map(jax.typeof, values))


def axes_of_types(types: Iterable[Any]) -> Axes:
  """Returns the mesh axes over which a value of any of these types (avals) varies."""
  return frozenset().union(*(kind.manual_axis_type.varying for kind in types))


def vary(tree: Any, axes: Collection[str]) -> Any:
  """Returns the tree with each leaf cast to vary over `axes`, beside those that it varies over.

  Parameters are cast once, before the loop over ticks: one that stayed invariant along `data` would
  have its gradient reduced over `data` at every use, once a microbatch in place of once a step.
  """

  def mark(leaf: Any) -> Any:
    missing = tuple(sorted(set(axes) - axes_of([leaf])))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(mark, tree)


def unvarying(leaf: Any) -> jax.ShapeDtypeStruct:
  """Returns a stand-in of the leaf's shape, dtype and weak type that varies over no axis."""
  kind = jax.typeof(leaf)
  return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def collectives(jaxpr: Any) -> Iterator[tuple[str, frozenset[str]]]:
  """Yields name and mesh axes of every equation that communicates, those in bodies included."""
  for equation in opened(jaxpr).eqns:
    named = (_each(equation.params.get(k)) for k in ("axes", "axis_name"))
    # Reductions over dims have a parameter `axes` too, of integers.
    axes = frozenset(axis for names in named for axis in names if isinstance(axis, str))
    if axes and equation.primitive.name not in _SILENT:
      yield str(equation.primitive.name), axes
    for inner in bodies(equation):
      yield from collectives(inner)


def _scan(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  """Runs a scan whose carry, and all that it returns, varies over the axes of `args`."""
  body = equation.params["jaxpr"]
  # Operands are constants, then the carry, then what is scanned over. Their numbers are found by
  # their dims, for what is scanned over has one dim less inside the body: the parameters that hold
  # the numbers differ between versions of JAX.
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
  """Runs a while loop whose carry varies over the axes of `args`."""
  params, axes = equation.params, axes_of(args)
  n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
  cond, body = _inner(params["cond_jaxpr"], axes), _inner(params["body_jaxpr"], axes)
  of_cond, of_body, carry = args[:n_cond], args[n_cond : n_cond + n_body], args[n_cond + n_body :]
  return lax.while_loop(
    lambda carry: cond(*of_cond, *carry)[0], lambda carry: body(*of_body, *carry), list(carry)
  )


def _cond(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  """Runs a conditional whose branches all return values varying over the axes of `args`."""
  branches = [_inner(branch, axes_of(args)) for branch in equation.params["branches"]]
  return lax.switch(args[0], branches, *args[1:])


def _pvary(equation: Equation, args: Sequence[Any]) -> Sequence[Any]:
  """Runs a cast to varying, over those of its axes along which the values do not vary yet."""
  # JAX refuses the cast for an axis over which a value varies already.
  varied: Sequence[Any] = vary(args, equation.params["axes"])
  return varied


def _inner(jaxpr: Any, axes: Axes) -> Callable[..., list[Any]]:
  """Returns a body or branch as a function whose outputs all vary over `axes`."""
  return lambda *args: vary(run(jaxpr, args, bind_varying), axes)


def _unlike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  """Counts the variables that have more dims outside a loop than inside."""
  return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _each(value: Any) -> Sequence[Any]:
  """Returns a parameter as a sequence, whether it holds one name or several."""
  return value if isinstance(value, tuple | list) else [value]
