"""Modules that exist already when they are given to a stack: their values, and what they share.

A stack wants factories, which build a module when its device is known. A module that is given as an
object has values and an identity instead: `init` starts from the values, and a variable that
several such modules hold, in whatever way, is one variable of the stack, tied. The variables of
bound Linen modules are plain arrays, so that there it is the array that several hold.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module.row_keys import Draws

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
  """A factory of a module that exists already; what it builds is a copy with the same values.

  Attributes:
    module: the object that the user holds, or that holds the user's Linen variables.
  """

  module: nnx.Module

  def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
    graph, state = nnx.split(self.module)
    return nnx.merge(graph, state)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
  """A module in a row that is called with entries of the batch beside x; see `layer`.

  Attributes:
    module: as `LayerStack.from_modules` takes it.
    entries: name of a parameter of its call -> the entry of the batch that it is given.
    draws: what it draws from its keys, once a trace has shown it.
  """

  module: Any
  entries: Mapping[str, str]
  draws: list[Draws] = dataclasses.field(default_factory=list)


def layer(module: Any, **entries: str) -> Layer:
  """Gives a module in a row entries of the batch, by the names of its call's parameters.

  `jaxpipe.layer(block, attention_mask="mask")` calls `block(x, attention_mask=batch["mask"])`.

  Args:
    module: an NNX module, class or factory, a Linen module, or a function of x.
    entries: name of a parameter -> name of an entry of the batch, leaves `[B, ...]`.

  Returns:
    What `LayerStack.from_modules`, `jaxpipe.pipeline` and `LayerStack.layers` take for a layer.

  Raises:
    StackError: an entry that is no name; when the stack is built, a parameter that the module's
      call does not have.
  """
  if isinstance(module, Layer):
    raise StackError("jaxpipe.layer of a jaxpipe.layer; give all entries to one")
  for name, entry in entries.items():
    if not isinstance(entry, str):
      raise StackError(
        f"jaxpipe.layer({name}={entry!r}): give the name of an entry of the batch, a string"
      )
  return Layer(module, entries)


def variables_of(module: Any) -> Iterator[tuple[str, nnx.Variable[Any]]]:
  """Yields the variables of a module with their paths, `/`-joined as in its parameter tree."""
  for path, _ in nnx.to_flat_state(nnx.state(module)):
    found = _variable_at(module, path)
    if isinstance(found, nnx.Variable):  # an array outside variables is refused elsewhere
      yield "/".join(map(str, path)), found


def shared(modules: Mapping[str, nnx.Module]) -> tuple[dict[str, str], dict[str, str]]:
  """Finds the variables that several given modules hold.

  Args:
    modules: place of a module, such as `layers/3` -> the object that was given there.

  Returns:
    Path of a variable, beginning with the module's place -> its path where it stood first: of the
    variables that are `nnx.BatchStat`s or derived from it, which change, and of all others.
  """
  first: dict[tuple[int, int], str] = {}
  others: dict[str, str] = {}
  statistics: dict[str, str] = {}
  for place, module in modules.items():
    # Two leaves of one Linen module are two variables, even where they begin as one array.
    seen: collections.Counter[int] = collections.Counter()
    for path, variable in variables_of(module):
      here, held = f"{place}/{path}", id(_identity(module, variable))
      owner = first.setdefault((held, seen[held]), here)
      seen[held] += 1
      if owner == here or isinstance(variable, (nnx.RngState, nnx.Intermediate)):
        continue
      (statistics if isinstance(variable, nnx.BatchStat) else others)[here] = owner
  return statistics, others


def _identity(module: Any, variable: nnx.Variable[Any]) -> Any:
  """The object that two modules both hold where they share a variable."""
  if not getattr(type(module), "shares_arrays", False):
    return variable
  value = variable.get_value()
  # Two equal numbers of Python may be one object by chance, and two arrays are not.
  return value if isinstance(value, (jax.Array, np.ndarray)) else variable


def share_again(given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
  """Makes new modules hold one variable wherever the given ones did.

  Args:
    given: place of a module -> the object that was given there.
    made: place of a module -> its new object, which is changed.
  """
  for paths in shared(given):
    for theirs, ours in paths.items():
      place = next(name for name in made if theirs.startswith(f"{name}/"))
      owner = next(name for name in made if ours.startswith(f"{name}/"))
      if made[place] is made[owner]:
        continue
      variable = _at(made[owner], ours.removeprefix(f"{owner}/"))
      *way, last = theirs.removeprefix(f"{place}/").split("/")
      holder = _at(made[place], "/".join(way)) if way else made[place]
      if last not in vars(holder):
        holder[int(last) if last.isdecimal() else last] = variable
      else:
        object.__setattr__(holder, last, variable)


def _at(module: Any, path: str) -> Any:
  """The object at a `/`-joined path inside a module."""
  return _variable_at(module, tuple(path.split("/")))


def existing(factory: Any, module: Any) -> bool:
  """Whether a factory returned a module that it had not made: one that it closes over.

  Args:
    factory: `rngs -> module`.
    module: what it returned, while JAX traces it.
  """
  found = [v for _, v in variables_of(module)]
  # What is made under a trace holds tracers; only variables with arrays can be older.
  if all(_traced(v) for v in found):
    return False
  again = {id(v) for _, v in variables_of(factory(nnx.Rngs(0)))}
  older = [id(v) in again for v in found]
  if any(older) and not all(older):
    raise StackError(
      "a factory returns a module of which some variables are older than it and others fresh; give"
      " the older module, or one that holds both, as an object"
    )
  return any(older)


def _traced(variable: nnx.Variable[Any]) -> bool:
  return isinstance(variable.get_value(), jax.core.Tracer)


def _variable_at(module: Any, path: tuple[Any, ...]) -> Any:
  """The variable at a path, found as NNX does: in lists by number, elsewhere by attribute."""
  node = module
  for name in path:
    # Not `getattr`: a Linen module may have a variable with the name of a method, or a number.
    held = node if isinstance(node, dict) else vars(node) if hasattr(node, "__dict__") else {}
    ways = (name, str(name), int(name) if str(name).isdecimal() else name)
    known = next((key for key in ways if key in held), None)
    node = node[ways[-1]] if known is None else held[known]
  return node
