"""The error that a stack raises for modules that cannot be pipelined as they were given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax.errors import FlaxError

Tree = Any


class StackError(ValueError):
  """The modules do not form a stack that can be pipelined, or not as they are asked to."""


# Errors of a module that is called with arguments it cannot take; any other is let through.
_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, AssertionError, FlaxError)


@contextlib.contextmanager
def called(name: str, x: Tree, cannot: str = "cannot be called with") -> Iterator[None]:
  """Turns errors of shapes and types in a call into a StackError that says whose call it was.

  Args:
    name: of the module, as messages name it.
    x: what it was called with, arrays or shapes; the message gives their dtypes and shapes.
    cannot: what it cannot, for the message.
  """
  try:
    yield
  except StackError:
    raise
  except _MISTAKES as error:
    given = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", x)
    # Messages of JAX and Flax have many lines, of which the first say what is wrong.
    said = " ".join(str(error).split())
    kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
    raise StackError(f"{name} {cannot} {given}: {kind}{said[:300]}") from error
