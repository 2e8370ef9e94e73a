"""Linen modules as modules of a stack.

Linen keeps parameters outside modules and creates them when it first sees an input; a stack wants a
factory of an NNX module that holds its own. The module made here holds a Linen module as static
data and its parameters under the names that Linen gave them; other collections, such as
`batch_stats`, are its model state. (`flax.nnx.bridge.ToNNX` also keeps a random stream, which no
layer of a pipeline may have.)

Linen modules learn by an argument of their call whether they train, under one of four names. It may
also be fixed when the module is made, as in `nn.BatchNorm(use_running_average=False)`. Linen's own
modules combine the two by `nn.merge_param`, which raises an error where both are given, so that a
flag is passed only where the constructor left it open.
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
from jaxpipe.stack.module_spec import StackError, count_arguments

Tree = Any

# Names by which Linen modules take their mode -> the value that means training.
_MODE_FLAGS = {
  "train": True,
  "training": True,
  "deterministic": False,
  "use_running_average": False,
}


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
      is set by whether it trains. Dropout is `context.dropout(x, rate)`.
    example_args: what its parameters' shapes follow from, arrays or `jax.ShapeDtypeStruct`s; only
      shapes and dtypes are read. A layer's context is not among them.
    batch: an example of the batch, for a layer that reads `context.batch`.

  Returns:
    `rngs -> nnx.Module`, whose parameters have the names and the tree of Linen's. Equal modules
    give layers of one kind.

  Raises:
    StackError: when the stack is built, a module with a random stream of its own.
  """

  module = _with_open_mode(module)

  def factory(rngs: nnx.Rngs) -> nnx.Module:
    args = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example_args)
    if len(args) < count_arguments(type(module), _MODE_FLAGS):
      rows = jnp.arange(jax.tree.leaves(args)[0].shape[0], dtype=jnp.int32)
      args = (*args, Context(batch, False, None, rows))
    flags: dict[str, Any] = {name: not value for name, value in _open_flags(module).items()}
    variables = _guard(module, lambda: module.init({"params": rngs.params()}, *args, **flags))
    # An initializer may box its value with names of axes, as `nn.with_partitioning` does.
    variables = nn.meta.unbox(dict(variables))
    # What draws random numbers only in training is refused now, not at the first step.
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

  The parameters are attributes of the module itself, under Linen's names; each other collection is
  a `Scope` under the collection's name.

  Attributes:
    use_running_average: True in evaluation. NNX modules have this attribute under this name, and
      `train()` and `eval()` set it in every module that does.
    label: name of the Linen module's class, for messages.
    _linen: the Linen module, static data.
    _collections: names of its collections besides `params`, sorted.
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
    args = (x, context)[: count_arguments(type(self._linen), _MODE_FLAGS)]
    out, changed = _apply(self._linen, variables, not self.use_running_average, args)
    for name, collection in changed.items():
      nnx.update(getattr(self, name), collection)
    return out


def _apply(
  module: nn.Module, variables: Mapping[str, Tree], trains: bool, args: Sequence[Any]
) -> tuple[Any, Mapping[str, Tree]]:
  """Calls the module; returns its output, and its collections as training has left them."""
  flags: dict[str, Any] = {name: trains is value for name, value in _open_flags(module).items()}
  mutable = [name for name in variables if name != "params"] if trains else []
  call = functools.partial(module.apply, variables, *args, mutable=mutable or False, **flags)
  with nn.intercept_methods(_normalize_over_all_rows):
    out = _guard(module, call)
  # Linen returns a pair where anything is mutable, and the output alone where nothing is.
  return out if mutable else (out, {})


def _normalize_over_all_rows(call: Any, args: Any, kwargs: Any, where: Any) -> Any:
  """Intercepts a module's call: a batch norm takes the statistics of all rows of a microbatch.

  Each device holds some rows of a microbatch; with statistics of these alone, outputs and gradients
  would depend on the mesh.
  """
  over = tuple(axis for axis in ROWS if axes.size(axis) > 1)
  if over and isinstance(where.module, nn.BatchNorm) and where.module.axis_name is None:
    # The module is bound to this call alone; as a dataclass it is frozen.
    object.__setattr__(where.module, "axis_name", over)
  return call(*args, **kwargs)


def _pure(module: nnx.Module, kept: Any = ...) -> Tree:
  """Values of the variables that a filter keeps, as a nested dict of arrays."""
  return nnx.to_pure_dict(nnx.state(module, kept))


def _open_flags(module: nn.Module) -> dict[str, bool]:
  """The mode flags that the module's call takes and its constructor left open.

  Returns:
    Name of the flag -> the value that means training.
  """
  parameters = inspect.signature(type(module).__call__).parameters
  return {
    name: value
    for name, value in _MODE_FLAGS.items()
    if name in parameters and not _fixed_by_constructor(module, name)
  }


def _fixed_by_constructor(module: nn.Module, name: str) -> bool:
  """Whether the module was made with a value for a mode flag.

  Only a field whose default is None stands in for the argument of the call, as `nn.merge_param`
  has it. A field with another default has the name by chance and means something of its own.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(module)}
  return name in defaults and defaults[name] is None and getattr(module, name) is not None


def _with_open_mode(module: nn.Module) -> nn.Module:
  """The module without flags by which its constructor made it train always, evaluation included.

  The stack then says at every call whether it trains. A flag that was fixed to evaluation stays.
  """
  reopened: dict[str, Any] = {
    name: None
    for name, value in _MODE_FLAGS.items()
    if _fixed_by_constructor(module, name) and getattr(module, name) is value
  }
  return module.clone(**reopened) if reopened else module


def _guard(module: nn.Module, call: Callable[[], Any]) -> Any:
  """Returns `call()`; says what to do where the module asks for a random stream."""
  try:
    return call()
  except errors.InvalidRngError as error:
    raise StackError(
      f"{_describe(module)} draws random numbers of its own: call context.dropout(x, rate) in place"
      " of nn.Dropout, or make it deterministic"
    ) from error


def _describe(module: nn.Module) -> str:
  """How error messages name a Linen module: by its own name, or else its class's."""
  return f"the Linen module {module.name or type(module).__name__}"
