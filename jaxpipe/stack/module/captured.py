"""Finds the weights that a function brings along, which no pipeline could train.

A function may read arrays from outside: of a module that it closes over, of an object whose method
it is, of a global. Traced, they are constants of its jaxpr, whichever way they came. A weight among
them would never be trained, so that a float array of JAX is refused; one of NumPy is a constant by
the choice of its author.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module.jaxprs import constants


def refuse_captured(name: str, jaxpr: core.ClosedJaxpr) -> None:
  """Refuses a call that reads float arrays of JAX which are no variables of its module.

  Args:
    name: how messages name the module.
    jaxpr: the call's, traced on shapes alone, so that its constants are arrays from outside.

  Raises:
    StackError: names the module, and the shape of the first such array.
  """
  for const in constants(jaxpr):
    # Scalars, such as a global `jnp.float32(-1e9)`, are numbers that somebody wrote down.
    if isinstance(const, jax.Array) and const.ndim and jnp.issubdtype(const.dtype, jnp.inexact):
      raise StackError(
        f"{name} reads an array {const.dtype}{list(const.shape)} that is no variable of it, and"
        " would never be trained: give the module that holds it (an nnx.Module, or a Linen module"
        " bound to its variables) in place of a function; or, if it is a constant, make it a NumPy"
        " array"
      )
