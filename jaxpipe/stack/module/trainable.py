"""Which variables are trained: filters that see the place of a variable in the whole stack.

A filter is an NNX filter of paths and variables. The first element of a path is the place of the
module, and the others are those within it: `("layers/3", "inner", "kernel")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import nnx

from jaxpipe.stack.errors import StackError

Predicate = Callable[[tuple[Any, ...], Any], bool]
Variables = Iterable[tuple[tuple[Any, ...], Any]]


def at_place(place: str, trainable: Any) -> Predicate:
  """A filter for the paths within one module.

  Args:
    place: of the module, such as `layers/3`.
    trainable: the stack's filter.
  """
  predicate = nnx.filterlib.to_predicate(trainable)

  def trained(path: tuple[Any, ...], value: Any) -> bool:
    # Statistics have no gradient; a filter such as `Not(...)` or `...` does not mean them.
    kind = getattr(value, "type", type(value))
    return not issubclass(kind, nnx.BatchStat) and predicate((place, *path), value)

  return trained


def refuse_unmatched(trainable: Any, variables: Variables) -> None:
  """Refuses a filter, or one that it is made of, that matches no variable of the stack.

  Args:
    trainable: the stack's filter.
    variables: path and value of every variable of the stack.

  Raises:
    StackError: names the filter and some paths that there are.
  """
  if trainable is nnx.Param:  # the default; a stack of functions has nothing to train
    return
  found = list(variables)
  for predicate in _all_of(trainable):
    if found and not any(predicate(path, value) for path, value in found):
      paths = ", ".join(sorted({"/".join(map(str, path)) for path, _ in found})[:4])
      raise StackError(
        f"trainable: {predicate!r} matches no variable of the stack, whose paths are {paths}, ...;"
        " a path begins with the place of the module, such as ('layers/3', 'inner', 'kernel')"
      )


def _all_of(trainable: Any) -> Iterator[Predicate]:
  """Yields a filter, and those that it is made of by `nnx.Not`, `nnx.Any` and `nnx.All`."""
  predicate = nnx.filterlib.to_predicate(trainable)
  yield predicate
  inner = [predicate.predicate] if isinstance(predicate, nnx.Not) else []
  for one in (*inner, *getattr(predicate, "predicates", ())):
    yield from _all_of(one)
