"""Linen modules as modules of a stack.

Linen keeps parameters outside modules and creates them when it first sees an input; a stack wants a
factory of an NNX module that holds its own. The module made here holds a Linen module as static
data and its parameters under the names that Linen gave them; other collections, such as
`batch_stats`, are its model state. A module that is bound to variables starts from these.

Linen modules learn by an argument of their call whether they train, under one of the names of
`MODE_FLAGS`. It may also be fixed when the module is made, as in
`nn.BatchNorm(use_running_average=False)`. Linen's own modules combine the two by `nn.merge_param`,
which raises an error where both are given, so that a flag is passed only where the constructor left
it open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.errors import InvalidRngError

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import ROWS, SEQUENCE
from jaxpipe.stack.context import Context
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module.given import Given
from jaxpipe.stack.module.modes import TRAINS
from jaxpipe.stack.module.signature import MODE_FLAGS, CallPlan, plan_call

Tree = Any

# Attribute of a wrapped module that holds all but its variables. No submodule can have this name,
# with a slash; any other a submodule may have, those of NNX's methods among them.
_WRAPPED = "/module"


def linen(
  module: nn.Module,
  *example_args: Tree,
  batch: Tree = None,
  entries: Mapping[str, str] | None = None,
) -> Callable[..., nnx.Module]:
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
      `(x, batch)`. A parameter `train`, `training` or `is_training`, or `deterministic` or
      `use_running_average`, is set by whether it trains. Where it is bound to variables, these are
      where `init` starts.
    example_args: what its parameters' shapes follow from, arrays or `jax.ShapeDtypeStruct`s; only
      shapes and dtypes are read. A layer's context is not among them.
    batch: an example of the batch, for a layer that reads `context.batch` or entries.
    entries: name of a parameter -> the entry of the batch that a layer is given, as by
      `jaxpipe.layer`.

  Returns:
    `rngs -> nnx.Module`, whose parameters have the names and the tree of Linen's. Equal modules
    give layers of one kind.

  Raises:
    StackError: a parameter that a stack cannot give; when the stack is built, a collection that
      the module sows and that nothing would read.
  """
  values: Mapping[str, Tree] | None = None
  if module.scope is not None:
    module, values = module.unbind()
  module = _with_open_mode(module)
  plan = plan_call(
    _describe(module),
    type(module).__call__,
    arguments=max(1, len(example_args)),
    bound=False,
    entries=entries,
    closed_flags=[name for name in MODE_FLAGS if _fixed_by_constructor(module, name)],
    context=len(example_args) < 2,
  )
  record = _Record(module, plan, _evaluating(module))
  if values is not None:
    return Given(Wrapped(record, meta.unbox(dict(values))))

  def factory(rngs: nnx.Rngs) -> nnx.Module:
    args = jax.tree.map(_zeros, example_args)
    rows = jnp.arange(jax.tree.leaves(args)[0].shape[0], dtype=jnp.int32)
    example = jax.tree.map(_zeros, batch)
    positional, named = plan.arguments(False, args, Context(batch, False, None, rows), example)
    with _sowing(module) as sown:
      variables = module.init({"params": rngs.params()}, *positional, **named)
    kept = {name: value for name, value in variables.items() if name not in sown}
    # An initializer may box its value with names of axes, as `nn.with_partitioning` does.
    return Wrapped(record, meta.unbox(kept))

  return factory


def _zeros(leaf: Any) -> jax.Array:
  """An array like an example's, of the dtype that JAX makes of it: int32 of NumPy's int64."""
  return jnp.zeros(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


@dataclasses.dataclass(frozen=True)
class _Record:
  """A Linen module as static data of the NNX module that stands for it.

  Attributes:
    module: the Linen module, unbound.
    plan: what its call is given.
    evaluating: the module with the flags of its constructor that say to train turned.
  """

  module: nn.Module
  plan: CallPlan
  evaluating: nn.Module


class Scope(nnx.Module):
  """A nested dict of variables of one type, under any names."""

  def __init__(self, values: Mapping[str, Tree], kind: type[nnx.Variable[Any]]) -> None:
    _hold(self, values, kind)


class Wrapped(nnx.Module):
  """A Linen module and its variables, called with as many arguments as the module takes.

  The parameters are attributes of the module itself, under Linen's names; each other collection is
  a `Scope` under the collection's name. A layer knows by its context whether it trains; embedding
  and head, which have none, by the attribute `TRAINS`.

  Attributes:
    shares_arrays: that modules which hold one array share a variable; see `module.given`.
  """

  shares_arrays: ClassVar[bool] = True

  def __init__(self, record: _Record, variables: Mapping[str, Tree]) -> None:
    setattr(self, _WRAPPED, record)
    setattr(self, TRAINS, True)
    _hold(self, variables.get("params", {}), nnx.Param)
    for name in sorted(set(variables) - {"params"}):
      _hold(self, {name: variables[name]}, nnx.BatchStat)

  @classmethod
  def label_of(cls, wrapped: Wrapped) -> str:
    """Name of the Linen module's class, for messages."""
    return type(getattr(wrapped, _WRAPPED).module).__name__

  @classmethod
  def variables_of(cls, wrapped: Wrapped) -> dict[str, Tree]:
    """The variables in Linen's form: collection -> nested dict of arrays."""
    params, others = nnx.state(wrapped, nnx.Param, ...)
    return {"params": nnx.to_pure_dict(params), **nnx.to_pure_dict(others)}

  def __call__(self, x: Any, context: Any = None) -> Any:
    record = vars(self)[_WRAPPED]
    trains = vars(self)[TRAINS]
    layer = isinstance(context, Context)
    # The second argument of a head is the batch.
    given = (x,) if layer or context is None else (x, context)
    batch = context.batch if layer else None
    args, flags = record.plan.arguments(trains, given, context, batch)
    variables = Wrapped.variables_of(self)
    mutable = [name for name in variables if name != "params"] if trains else []
    module = record.module if trains else record.evaluating
    call = functools.partial(
      module.apply,
      variables,
      *args,
      mutable=mutable or False,
      rngs=context.linen_keys() if layer else None,
      **flags,
    )
    with nn.intercept_methods(_normalize_over_all_rows), _sowing(module):
      try:
        out = call()
      except InvalidRngError as error:
        raise StackError(
          f"{_describe(module)} draws random numbers, and only layers are given keys: make it a"
          " layer of its own"
        ) from error
    if not mutable:
      return out
    # Linen returns a pair where anything is mutable, and the output alone where nothing is.
    out, changed = out
    for name, collection in changed.items():
      nnx.update(vars(self)[name], collection)
    return out


def _hold(module: nnx.Module, values: Mapping[str, Tree], kind: type[nnx.Variable[Any]]) -> None:
  """Gives a module the variables of a nested dict as attributes, beside those that it has.

  Raises:
    StackError: two collections have a variable of one name at the same place.
  """
  for name, value in values.items():
    held = vars(module).get(name)
    if isinstance(value, Mapping) and held is None:
      setattr(module, name, Scope(value, kind))
    elif isinstance(value, Mapping) and isinstance(held, Scope):
      _hold(held, value, kind)
    elif held is None:
      setattr(module, name, kind(value))
    else:
      raise StackError(f"two collections of a Linen module have a variable {name}; rename one")


@contextlib.contextmanager
def _sowing(module: nn.Module) -> Iterator[set[str]]:
  """Records into which collections modules sow, while one of them is traced.

  Args:
    module: for the message.

  Raises:
    StackError: one of them sows anything but intermediates, such as auxiliary losses, which nothing
      in a pipeline would add to the loss.
  """
  sown: set[str] = set()
  # A collection does not say whether it was sown: with a `reduce_fn` it holds plain arrays.
  original = nn.Module.sow

  def sow(self: nn.Module, collection: str, *args: Any, **options: Any) -> bool:
    if collection != "intermediates":
      raise StackError(
        f"{_describe(module)} sows into the collection {collection!r}, which nothing in a pipeline"
        " would read: return it as part of x, so that the loss can add it; only intermediates,"
        " which are for looking, are dropped"
      )
    sown.add(collection)
    return original(self, collection, *args, **options)

  nn.Module.sow = sow  # type: ignore[method-assign, assignment]
  try:
    yield sown
  finally:
    nn.Module.sow = original  # type: ignore[method-assign]


def _normalize_over_all_rows(call: Any, args: Any, kwargs: Any, where: Any) -> Any:
  """Intercepts a module's call: a batch norm takes the statistics of all rows of a microbatch.

  Each device holds some rows of a microbatch; with statistics of these alone, outputs and gradients
  would depend on the mesh.
  """
  # Along `sequence`, devices have other positions of the same rows.
  over = tuple(axis for axis in (*ROWS, SEQUENCE) if axes.size(axis) > 1)
  if over and isinstance(where.module, nn.BatchNorm) and where.module.axis_name is None:
    # The module is bound to this call alone; as a dataclass it is frozen.
    object.__setattr__(where.module, "axis_name", over)
  return call(*args, **kwargs)


def _fixed_by_constructor(module: nn.Module, name: str) -> bool:
  """Whether the module was made with a value for a mode flag.

  Only a field whose default is None stands in for the argument of the call, as `nn.merge_param`
  has it. One with another default does not, and may stand beside it; see `_evaluating`.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(module)}
  return name in defaults and defaults[name] is None and getattr(module, name) is not None


def _with_open_mode(module: nn.Module) -> nn.Module:
  """The module without flags by which its constructor made it train always, evaluation included.

  The stack then says at every call whether it trains. A flag that was fixed to evaluation stays.
  """
  reopened: dict[str, Any] = {
    name: None
    for name, value in MODE_FLAGS.items()
    if _fixed_by_constructor(module, name) and getattr(module, name) is value
  }
  return module.clone(**reopened) if reopened else module


def _evaluating(module: nn.Module) -> nn.Module:
  """The module for evaluation: a field such as `train: bool = True` says that it trains always."""
  turned: dict[str, Any] = {
    name: not value
    for name, value in MODE_FLAGS.items()
    if name in {field.name for field in dataclasses.fields(module)}
    and getattr(module, name) is value
  }
  return module.clone(**turned) if turned else module


def _describe(module: nn.Module) -> str:
  """How error messages name a Linen module: by its own name, or else its class's."""
  return f"the Linen module {module.name or type(module).__name__}"
