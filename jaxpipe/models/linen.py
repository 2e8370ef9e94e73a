"""Linen modules as parts of a stack.

Linen keeps parameters outside modules and creates them when it first sees an input; a stack wants a
factory of an NNX module that holds its own. The module made here holds a Linen module as static
data and its parameters under the names that Linen gave them. (`flax.nnx.bridge.ToNNX` also keeps a
random stream and every other collection: mutable state, which no pipelined layer may have.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn

from jaxpipe.models.context import Context
from jaxpipe.models.stack import StackError

Tree = Any


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
      `(x, batch)`. It may have parameters and nothing else; dropout is `context.dropout(x, rate)`.
    example_args: what its parameters' shapes follow from, arrays or `jax.ShapeDtypeStruct`s; only
      shapes and dtypes are read. A layer's context is not among them.
    batch: an example of the batch, for a layer that reads `context.batch`.

  Returns:
    `rngs -> nnx.Module`, whose parameters have the names and the tree of Linen's. Equal modules
    give layers of one kind.

  Raises:
    StackError: when the stack is built, a module with another collection than `params`, or with a
      random stream of its own.
  """
  wanted = _positional(type(module).__call__)

  def factory(rngs: nnx.Rngs) -> nnx.Module:
    args = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example_args)
    if len(args) + 1 == wanted:
      rows = jnp.arange(jax.tree.leaves(args)[0].shape[0], dtype=jnp.int32)
      args = (*args, Context(batch, False, None, rows))
    variables = _guard(module, lambda: module.init({"params": rngs.params()}, *args))
    others = sorted(set(variables) - {"params"})
    if others:
      raise StackError(
        f"{_name(module)} has the collections {', '.join(others)}; only params is supported yet:"
        " use a norm without running statistics, and keep no other state"
      )
    wrapped = Wrapped(module, wanted, nn.meta.unbox(variables.get("params", {})))
    jax.eval_shape(lambda: wrapped(*args))  # refused now, not at the first step
    return wrapped

  return factory


class Scope(nnx.Module):
  """A nested dict of parameters."""

  def __init__(self, params: Mapping[str, Tree]) -> None:
    for name, value in params.items():
      setattr(self, name, Scope(value) if isinstance(value, Mapping) else nnx.Param(value))


class Wrapped(Scope):
  """A Linen module and its parameters, called with as many arguments as the module takes."""

  def __init__(self, module: nn.Module, wanted: int, params: Mapping[str, Tree]) -> None:
    super().__init__(params)
    self._linen, self._wanted = module, wanted

  def __call__(self, *args: Any) -> Any:
    params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
    call = lambda: self._linen.apply({"params": params}, *args[: self._wanted])  # noqa: E731
    return _guard(self._linen, call)


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
  parameters = list(inspect.signature(call).parameters.values())[1:]
  if any(p.kind is p.VAR_POSITIONAL for p in parameters):
    return 1000
  return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _name(module: nn.Module) -> str:
  return f"the Linen module {module.name or type(module).__name__}"
