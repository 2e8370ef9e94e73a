"""Whether two modules compute the same, read from the jaxprs of their calls and gradients.

Modules carry attributes that no computation depends on: the number of a layer, an initializer, a
lambda of their own that does what another's does. Two modules whose variables are alike and whose
jaxprs are equal are one kind to a pipeline, and one loop runs them.

A jaxpr holds functions only where a derivative is given by hand (`jax.custom_vjp`): two of them
cannot be compared. So the gradient is traced, too, where such a derivative stands as equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxpipe.stack.module.jaxprs import is_jaxpr, opened

Tree = Any


def traced(
  call: Callable[..., Any], evaluation: Callable[..., Any], *args: Tree
) -> tuple[Any, ...]:
  """Traces a call, its gradient, and the call in evaluation.

  Args:
    call: `(params, *rest) -> outputs`, pure.
    evaluation: the call as it is evaluated, of the same arguments.
    args: shapes of its arguments.

  Returns:
    The jaxpr of the call; that of its gradient by all floats among its arguments for a cotangent of
    ones; and that of the evaluation.
  """
  leaves, structure = jax.tree.flatten(args)
  floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

  def gradient(*leaves: Any) -> Any:
    def of_floats(*values: Any) -> list[Any]:
      whole = list(leaves)
      for i, value in zip(floats, values, strict=True):
        whole[i] = value
      out = jax.tree.leaves(call(*jax.tree.unflatten(structure, whole)))
      return [leaf for leaf in out if jnp.issubdtype(leaf.dtype, jnp.floating)]

    outs, pull = jax.vjp(of_floats, *(leaves[i] for i in floats))
    return pull([jnp.ones_like(out) for out in outs])

  return (
    jax.make_jaxpr(call)(*args),
    jax.make_jaxpr(gradient)(*leaves),
    jax.make_jaxpr(evaluation)(*args),
  )


def difference(a: tuple[Any, ...], b: tuple[Any, ...]) -> str | None:
  """What first differs between two results of `traced`; None where they compute the same."""
  found = (_differ(one, other) for one, other in zip(a, b, strict=True))
  return next(filter(None, found), None)


def _differ(a: Any, b: Any) -> str | None:
  """What first differs between two jaxprs, open or closed."""
  consts = zip(getattr(a, "consts", ()), getattr(b, "consts", ()), strict=False)
  if len(getattr(a, "consts", ())) != len(getattr(b, "consts", ())):
    return "they read other constants"
  if any(x is not y and not _same_array(x, y) for x, y in consts):
    return "they read other constants"
  a, b = opened(a), opened(b)
  number: dict[Any, int] = {}
  others: dict[Any, int] = {}

  def same(x: Any, y: Any) -> bool:
    """Whether two operands are the same variable, by their places, or equal literals."""
    if isinstance(x, core.Literal) or isinstance(y, core.Literal):
      both = isinstance(x, core.Literal) and isinstance(y, core.Literal)
      return both and x.aval == y.aval and _same_array(x.val, y.val)
    here, there = number.setdefault(x, len(number)), others.setdefault(y, len(others))
    return here == there and x.aval == y.aval

  def all_same(xs: Any, ys: Any) -> bool:
    return len(xs) == len(ys) and all(map(same, xs, ys))

  if not all_same([*a.constvars, *a.invars], [*b.constvars, *b.invars]):
    return "their inputs differ"
  for one, other in zip(a.eqns, b.eqns, strict=False):
    name, its = one.primitive.name, other.primitive.name
    if name != its:
      return f"one does {name} where the other does {its}"
    if not all_same(one.invars, other.invars):
      return f"their {name} read other values"
    if one.params.keys() != other.params.keys():
      return f"their {name} differ"
    # What is left of a derivative by hand is a function, new at every trace. It says nothing that
    # the gradient's equations do not say.
    skip = name.startswith("custom_")
    for key, value in one.params.items():
      if skip and not isinstance(value, (bool, int, tuple)) and not is_jaxpr(value):
        continue
      if not _same_param(value, other.params[key]):
        return f"their {name} differ in {key}"
    if not all_same(one.outvars, other.outvars):
      return f"their {name} return other shapes"
  if len(a.eqns) != len(b.eqns) or not all_same(a.outvars, b.outvars):
    return "one computes more than the other"
  return None


def _same_param(a: Any, b: Any) -> bool:
  """Whether a parameter of two equations means the same."""
  if a is b:
    return True
  if is_jaxpr(a) and is_jaxpr(b):
    return _differ(a, b) is None
  if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(_same_param(x, y) for x, y in pairs)
  if isinstance(a, (jax.Array, np.ndarray)):
    return _same_array(a, b)
  return type(a) is type(b) and bool(a == b)


def _same_array(a: Any, b: Any) -> bool:
  """Whether two constants have the same dtype, shape and values."""
  if jnp.result_type(a) != jnp.result_type(b) or np.shape(a) != np.shape(b):
    return False
  if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
    return False
  return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=False))
