"""Builds a module abstractly, refuses what no pipeline could keep, and takes the module apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module.given import Given, existing
from jaxpipe.stack.module.modes import flags_set_when_made
from jaxpipe.stack.module.trainable import Predicate

_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)

# Builds a module, fresh values included.
Factory = Callable[[nnx.Rngs], nnx.Module]


def split_module(module: nnx.Module, trainable: Predicate) -> tuple[Any, Any, Any, Any]:
  """The module's static half, its random streams, its parameters and all its other variables.

  What `sow` has left in the module by an earlier call is dropped.
  """
  if any(isinstance(v, nnx.Intermediate) for _, v in nnx.iter_graph(module)):
    module = nnx.clone(module)
    nnx.pop(module, nnx.Intermediate)
  graph, streams, *others = nnx.split(module, nnx.RngState, trainable, ...)
  return graph, streams, others[0], others[1]


def place_of(name: str) -> str:
  """The place of a module as paths write it, `layers/3`, out of its name `layers[3]`."""
  return name.replace("[", "/").removesuffix("]")


def module_label(module: Any) -> str:
  """The name of a module's class for messages; of a wrapped Linen module, that of Linen's."""
  label = getattr(type(module), "label_of", None)
  return str(label(module)) if label else type(module).__name__


def built(factory: Any) -> tuple[Factory, nnx.Module]:
  """Builds a module abstractly; a factory that returns a module it closes over becomes `Given`."""
  older: list[nnx.Module] = []

  def build() -> nnx.Module:
    module: nnx.Module = factory(nnx.Rngs(0))
    if not isinstance(factory, Given) and existing(factory, module):
      older.append(module)
      return Given(module)(nnx.Rngs(0))
    return module

  module = nnx.eval_shape(build)
  return (Given(older[0]) if older else factory), module


def refuse_unsteady(where: str, factory: Any) -> None:
  """Refuses a factory of several layers that makes another module each time it is called.

  Layers of one factory are traced once, and a factory that counts its calls would give all of them
  the first one's attributes. Looked at are shapes, numbers, texts and tuples of these; functions
  and other objects are not.

  Args:
    where: how messages name the layer.
    factory: of several layers.

  Raises:
    StackError: names the attribute and its values in two calls.
  """
  if isinstance(factory, Given):
    return
  first, second = (_plain_attributes(factory) for _ in range(2))
  for at in first.keys() | second.keys():
    if first.get(at) != second.get(at):
      raise StackError(
        f"{where}: its factory makes {at} {first.get(at)} in one call and {second.get(at)} in the"
        " next, and layers of one factory are alike: give each layer a factory of its own, such"
        " as functools.partial(Layer, number=i)"
      )


def _plain_attributes(factory: Any) -> dict[str, str]:
  """Path -> attribute of a new module, written out: shapes of variables, and what is plain."""
  module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
  found = {}
  for path, node in nnx.iter_graph(module):
    at = "/".join(map(str, path))
    if isinstance(node, nnx.Variable):
      leaves = jax.tree.leaves(node.get_value())
      found[at] = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
    elif isinstance(node, nnx.Module):
      found |= {f"{at}/{k}".strip("/"): repr(v) for k, v in vars(node).items() if _is_plain(v)}
  return found


def _is_plain(value: Any) -> bool:
  """Whether a value is a number, a text or a bool, or a tuple of such."""
  if isinstance(value, tuple):
    return all(map(_is_plain, value))
  return isinstance(value, (bool, int, float, str))


def refuse_arrays(where: str, module: nnx.Module) -> None:
  """Refuses arrays that a module holds outside variables.

  Raises:
    StackError: names the module and the attribute.
  """
  for path, value in nnx.iter_graph(module):
    if not isinstance(value, nnx.Variable) and isinstance(value, _ARRAYS):
      raise StackError(
        f"{where} holds the array {'/'.join(map(str, path))} outside any nnx.Param: make it an"
        " nnx.Param where it is trained, else compute it in __call__, or make it a NumPy array"
        " outside the module"
      )


def kept_flags(module: nnx.Module) -> frozenset[str]:
  """Mode flags that the module keeps as attributes and takes by a parameter that defaults to None.

  Such a parameter overrides the attribute, which the stack sets.
  """
  call: Any = type(module).__call__
  parameters = inspect.signature(call).parameters
  return frozenset(
    name
    for name in flags_set_when_made(module)
    if name in parameters and parameters[name].default is None
  )
