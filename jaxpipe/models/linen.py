"""Linen modules as parts of a stack.

Linen keeps parameters outside modules and creates them when it first sees an input; a stack wants a
factory of an NNX module that holds its own. The module made here holds a Linen module as static
data and its parameters under the names that Linen gave them; other collections, such as
`batch_stats`, are its state. (`flax.nnx.bridge.ToNNX` also keeps a random stream, which no layer of
a pipeline may have.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn

from jaxpipe.models.context import Context
from jaxpipe.models.part import StackError

Tree = Any

# What Linen modules call the argument that says whether they are trained.
_TOLD = ("train", "training")


def linen(module: nn.Module, *example_args: Tree, batch: Tree = None) -> Callable[..., nnx.Module]:
  """Returns a factory of `module`, for a `LayerStack`.

  ```
  LayerStack(
    embed=linen(Embed(), batch),
    layers=[linen(Block(), x)] * 8,
    head=linen(Head(), x, batch),
  )
  ```

  Args:
    module: with a `__call__` as the stack calls it: `(batch)`, `(x)` or `(x, context)`,
      `(x, batch)`. A parameter `train` or `training` is told whether it is trained. Dropout is
      `context.dropout(x, rate)`.
    example_args: what its parameters' shapes follow from, arrays or `jax.ShapeDtypeStruct`s; only
      shapes and dtypes are read. A layer's context is not among them.
    batch: an example of the batch, for a layer that reads `context.batch`.

  Returns:
    `rngs -> nnx.Module`, whose parameters have the names and the tree of Linen's. Equal modules
    give layers of one kind.

  Raises:
    StackError: when the stack is built, a module with a random stream of its own.
  """
  wanted = _positional(type(module).__call__)

  def factory(rngs: nnx.Rngs) -> nnx.Module:
    args = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example_args)
    if len(args) + 1 == wanted:
      rows = jnp.arange(jax.tree.leaves(args)[0].shape[0], dtype=jnp.int32)
      args = (*args, Context(batch, False, None, rows))
    told: dict[str, Any] = {name: False for name in _told(module)}
    variables = _guard(module, lambda: module.init({"params": rngs.params()}, *args, **told))
    wrapped = Wrapped(module, wanted, nn.meta.unbox(dict(variables)))
    jax.eval_shape(lambda: wrapped(*args))  # refused now, not at the first step
    return wrapped

  return factory


class Scope(nnx.Module):
  """A nested dict of variables of one type."""

  def __init__(self, values: Mapping[str, Tree], kind: type[nnx.Variable[Any]]) -> None:
    for name, value in values.items():
      setattr(self, name, Scope(value, kind) if isinstance(value, Mapping) else kind(value))


class Wrapped(Scope):
  """A Linen module and its variables, called with as many arguments as the module takes.

  Attributes:
    use_running_average: set by the stack, as in every NNX module that has it: not while training.
  """

  def __init__(self, module: nn.Module, wanted: int, variables: Mapping[str, Tree]) -> None:
    super().__init__(variables.get("params", {}), nnx.Param)
    self._linen, self._wanted = module, wanted
    self._collections = tuple(sorted(set(variables) - {"params"}))
    self.use_running_average = True
    for name in self._collections:
      setattr(self, name, Scope(variables[name], nnx.BatchStat))

  def __call__(self, *args: Any) -> Any:
    trains = not self.use_running_average
    variables = {name: _pure(getattr(self, name)) for name in self._collections}
    variables["params"] = _pure(self, nnx.Param)
    told: dict[str, Any] = {name: trains for name in _told(self._linen)}
    changes: Any = list(self._collections) if trains and self._collections else False
    apply = functools.partial(self._linen.apply, variables, mutable=changes)
    out = _guard(self._linen, lambda: apply(*args[: self._wanted], **told))
    if not changes:
      return out
    out, changed = out
    for name in self._collections:
      nnx.update(getattr(self, name), changed[name])
    return out


def _pure(module: nnx.Module, kept: Any = ...) -> Tree:
  return nnx.to_pure_dict(nnx.state(module, kept))


def _told(module: nn.Module) -> list[str]:
  """Parameters of the module's call that say whether it is trained."""
  names = inspect.signature(type(module).__call__).parameters
  return [name for name in _TOLD if name in names]


def _guard(module: nn.Module, call: Callable[[], Any]) -> Any:
  try:
    return call()
  except errors.InvalidRngError as error:
    raise StackError(
      f"{_name(module)} draws random numbers of its own: call context.dropout(x, rate) in place of"
      " nn.Dropout, or make it deterministic"
    ) from error


def _positional(call: Callable[..., Any]) -> int:
  """How many positional arguments a method takes besides self; no limit, a great many."""
  parameters = [
    p for n, p in list(inspect.signature(call).parameters.items())[1:] if n not in _TOLD
  ]
  if any(p.kind is p.VAR_POSITIONAL for p in parameters):
    return 1000
  return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _name(module: nn.Module) -> str:
  return f"the Linen module {module.name or type(module).__name__}"
