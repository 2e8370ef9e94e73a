"""Linen modules as parts of a stack.

Linen keeps parameters outside modules and creates them when it first sees an input; a stack wants a
factory of an NNX module that holds its own. The module made here holds a Linen module as static
data and its parameters under the names that Linen gave them; other collections, such as
`batch_stats`, are its state. (`flax.nnx.bridge.ToNNX` also keeps a random stream, which no layer of
a pipeline may have.)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import ROWS
from jaxpipe.stack.context import Context
from jaxpipe.stack.module_spec import StackError, wanted

Tree = Any

# What Linen modules call the argument that says whether they train, and what it is then.
_TOLD = {"train": True, "training": True, "deterministic": False, "use_running_average": False}


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
      `(x, batch)`. A parameter `train` or `training`, or `deterministic` or `use_running_average`,
      is told whether it trains. Dropout is `context.dropout(x, rate)`.
    example_args: what its parameters' shapes follow from, arrays or `jax.ShapeDtypeStruct`s; only
      shapes and dtypes are read. A layer's context is not among them.
    batch: an example of the batch, for a layer that reads `context.batch`.

  Returns:
    `rngs -> nnx.Module`, whose parameters have the names and the tree of Linen's. Equal modules
    give layers of one kind.

  Raises:
    StackError: when the stack is built, a module with a random stream of its own.
  """

  module = _forgetting(module)

  def factory(rngs: nnx.Rngs) -> nnx.Module:
    args = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example_args)
    if len(args) < wanted(type(module), _TOLD):
      rows = jnp.arange(jax.tree.leaves(args)[0].shape[0], dtype=jnp.int32)
      args = (*args, Context(batch, False, None, rows))
    told: dict[str, Any] = {name: not says for name, says in _told(module).items()}
    variables = _guard(module, lambda: module.init({"params": rngs.params()}, *args, **told))
    variables = nn.meta.unbox(dict(variables))
    # Refused now, not at the first step.
    jax.eval_shape(lambda: _apply(module, variables, True, args)[0])
    return Wrapped(module, variables)

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
    label: the Linen module's class.
  """

  def __init__(self, module: nn.Module, variables: Mapping[str, Tree]) -> None:
    super().__init__(variables.get("params", {}), nnx.Param)
    self._linen, self.label = module, type(module).__name__
    self._collections = tuple(sorted(set(variables) - {"params"}))
    self.use_running_average = True
    for name in self._collections:
      setattr(self, name, Scope(variables[name], nnx.BatchStat))

  def __call__(self, x: Any, context: Any = None) -> Any:
    variables = {name: _pure(getattr(self, name)) for name in self._collections}
    variables["params"] = _pure(self, nnx.Param)
    args = (x, context)[: wanted(type(self._linen), _TOLD)]
    out, changed = _apply(self._linen, variables, not self.use_running_average, args)
    for name, collection in changed.items():
      nnx.update(getattr(self, name), collection)
    return out


def _apply(
  module: nn.Module, variables: Mapping[str, Tree], trains: bool, args: Sequence[Any]
) -> tuple[Any, Mapping[str, Tree]]:
  """What the module returns, and what training has made of its collections."""
  told: dict[str, Any] = {name: trains is says for name, says in _told(module).items()}
  changes = [name for name in variables if name != "params"] if trains else []
  call = functools.partial(module.apply, variables, *args, mutable=changes or False, **told)
  with nn.intercept_methods(_over_all_rows):
    out = _guard(module, call)
  return out if changes else (out, {})


def _over_all_rows(call: Any, args: Any, kwargs: Any, where: Any) -> Any:
  """Statistics of a batch norm are those of all rows of the microbatch, wherever they lie."""
  over = tuple(axis for axis in ROWS if axes.size(axis) > 1)
  if over and isinstance(where.module, nn.BatchNorm) and where.module.axis_name is None:
    # The module is bound to this call alone; as a dataclass it is frozen.
    object.__setattr__(where.module, "axis_name", over)
  return call(*args, **kwargs)


def _pure(module: nnx.Module, kept: Any = ...) -> Tree:
  return nnx.to_pure_dict(nnx.state(module, kept))


def _told(module: nn.Module) -> dict[str, bool]:
  """Parameters of the module's call that say whether it trains, and what they say if it does."""
  names = inspect.signature(type(module).__call__).parameters
  # What the module was told when it was made, and not to forget, it takes ill to be told again.
  return {name: says for name, says in _TOLD.items() if name in names and not _knows(module, name)}


def _knows(module: nn.Module, name: str) -> bool:
  """Whether a field of this name, which the call's argument stands in for, is set."""
  mine = {field.name: field.default for field in dataclasses.fields(module)}
  return name in mine and mine[name] is None and getattr(module, name) is not None


def _forgetting(module: nn.Module) -> nn.Module:
  """The module without having been told that it trains, always: it does, but not in evaluation."""
  told: dict[str, Any] = {}
  for name, says in _TOLD.items():
    if _knows(module, name) and getattr(module, name) is says:
      told[name] = None
  return module.clone(**told) if told else module


def _guard(module: nn.Module, call: Callable[[], Any]) -> Any:
  try:
    return call()
  except errors.InvalidRngError as error:
    raise StackError(
      f"{_name(module)} draws random numbers of its own: call context.dropout(x, rate) in place of"
      " nn.Dropout, or make it deterministic"
    ) from error


def _name(module: nn.Module) -> str:
  return f"the Linen module {module.name or type(module).__name__}"
