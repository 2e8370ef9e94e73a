"""Makes the factories of a stack out of modules in a row: NNX, Linen or plain functions.

A stack wants factories that need nothing but `rngs`. Linen modules want examples of their inputs as
well, and a module that is given as an object has values and an identity. So the modules are traced
one after the other, each on the shapes that the one before returns:

    batch -> Select -> x -> modules[0] -> x ... -> modules[-1] -> y -> Loss -> loss_sum, weight, {}
             embed          layers/0                layers/L-1         head
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxpipe.stack.context import Context, Filled, leaves_of_rows, rows_alone
from jaxpipe.stack.errors import StackError, called
from jaxpipe.stack.layer_trace import ShapeWalk
from jaxpipe.stack.linen import Wrapped, linen
from jaxpipe.stack.module.captured import refuse_captured
from jaxpipe.stack.module.given import Given, Layer
from jaxpipe.stack.module.parts import Factory
from jaxpipe.stack.module.signature import CallPlan, plan_call
from jaxpipe.stack.module_spec import ModuleSpec, sums

Tree = Any


def factories_of(
  modules: Sequence[Any],
  loss: Callable[[Tree, Tree], Any],
  batch: Tree,
  inputs: str | Callable[[Tree], Tree],
) -> tuple[Factory, list[Any], Factory]:
  """Factories of an embedding, of the layers and of a head.

  Args:
    modules: NNX modules, classes or factories, Linen modules, or functions of x; or a `Layer` of
      such a one.
    loss: `loss(y, batch)`, of what the last module returns.
    batch: an example batch or its shapes, leaves [B, ...].
    inputs: which entry of the batch goes into the first module, or a function of the batch.

  Returns:
    `embed, layers, head`, arguments of `LayerStack`. The embedding and the head have no parameters.

  Raises:
    StackError: a module that cannot take what the one before returns, or reads weights that are no
      variables of it; a loss without rows; `inputs` that is not in the batch.
  """
  select = inputs if callable(inputs) else _entry(inputs)
  x = _input_shapes(select, inputs, batch)
  layers: list[Any] = []
  made: dict[int, Any] = {}  # one factory for a module that stands several times

  def of_rows(batch: Tree) -> Tree:
    return select(rows_alone(batch))

  walk = ShapeWalk(batch, x, lambda: jax.eval_shape(of_rows, walk.batch_of_more))
  for i, module in enumerate(modules):
    name = f"layers[{i}]"
    given = module if isinstance(module, Layer) else Layer(module, {})
    label = f"{name} ({_label(given.module)})"
    # An unbound Linen module makes its parameters by the shapes of its x, at every place anew.
    fresh = isinstance(given.module, nn.Module) and given.module.scope is None
    if fresh or id(module) not in made:
      made[id(module)] = _factory(label, given, walk.x, batch)
    factory = made[id(module)]
    # Linen modules, functions and methods give themselves what they want of the batch. Every place
    # has a `Layer` of its own, for what is drawn there.
    entries = factory.entries if isinstance(factory, Layer) else {}
    layers.append(Layer(factory.module if isinstance(factory, Layer) else factory, entries))
    with called(label, walk.x, "cannot be made for"):
      spec = ModuleSpec.trace(name, layers[-1])
    walk.through(spec)
  _check_loss(loss, walk, batch)
  return (lambda rngs: Select(select)), layers, (lambda rngs: Loss(loss))


class Select(nnx.Module):
  """An embedding without parameters: picks what of the batch goes into the first module."""

  def __init__(self, select: Callable[[Tree], Tree]) -> None:
    self._select = select

  def __call__(self, batch: Tree) -> Tree:
    return self._select(rows_alone(batch))


class Apply(nnx.Module):
  """A plain function of x as a module without variables.

  Attributes:
    training: the mode, for a function that takes a mode flag.
  """

  @classmethod
  def label_of(cls, module: Any) -> str:
    """Name of the function, for messages."""
    return _label(module._function)

  def __init__(self, function: Callable[..., Tree], plan: CallPlan) -> None:
    self._function, self._plan = function, plan
    self.training = True

  def __call__(self, x: Tree, context: Context) -> Tree:
    args, named = self._plan.arguments(self.training, (x,), context, context.batch)
    return self._function(*args, **named)


class Method(nnx.Module):
  """A bound method of an NNX module, as a module with the variables of the other."""

  @classmethod
  def label_of(cls, module: Any) -> str:
    """Name of the class and of the method, for messages."""
    return f"{type(module.module).__name__}.{module._name}"

  def __init__(self, module: nnx.Module, name: str, plan: CallPlan) -> None:
    self.module = module
    self._name, self._plan = name, plan
    self.training = True

  def __call__(self, x: Tree, context: Context) -> Tree:
    args, named = self._plan.arguments(self.training, (x,), context, context.batch)
    return getattr(self.module, self._name)(*args, **named)


class Loss(nnx.Module):
  """A head without parameters: sums up a loss, which is one for every row or sums already."""

  def __init__(self, loss: Callable[[Tree, Tree], Any]) -> None:
    self._loss = loss

  def __call__(self, y: Tree, batch: Tree) -> Any:
    out = self._loss(y, rows_alone(batch))
    filled = isinstance(batch, Filled)
    if isinstance(out, tuple):
      if filled:
        raise StackError(
          "the loss returns sums, from which rows that only fill up the batch cannot be left out:"
          " use a number of rows that microbatches and data shards divide, or return a loss for"
          " every row"
        )
      return out
    # float16 cannot count beyond 2048, nor bfloat16 beyond 256.
    wide = jnp.promote_types(out.dtype, jnp.float32)
    if not filled:
      return jnp.sum(out, dtype=wide), jnp.asarray(out.size, wide), {}
    # Chosen, not multiplied by 0: the loss of a row that does not count may be anything.
    counts = batch.counts.reshape(-1, *(1 for _ in out.shape[1:]))
    weight = jnp.sum(batch.counts, dtype=wide) * (out.size // len(out))
    return jnp.sum(jnp.where(counts, out, 0), dtype=wide), weight, {}


def as_given(module: Any) -> Any:
  """What a user gave in place of a module: a function or a method, or Linen variables for a module.

  Args:
    module: with the values that are to be given back.
  """
  if isinstance(module, Wrapped):
    return Wrapped.variables_of(module)
  if isinstance(module, Apply):
    return module._function
  if isinstance(module, Method):
    return getattr(module.module, module._name)
  return module


def _entry(name: str) -> Callable[[Tree], Tree]:
  """The function of a batch that picks one entry."""
  return lambda batch: batch[name]


def _input_shapes(select: Callable[[Tree], Tree], inputs: Any, batch: Tree) -> Tree:
  """Shapes of the first module's x.

  Raises:
    StackError: the batch has no such entry; names those that it has.
  """
  try:
    jaxpr, x = jax.make_jaxpr(select, return_shape=True)(rows_alone(batch))
    refuse_captured("inputs", jaxpr)
    return x
  except (KeyError, TypeError, IndexError) as error:
    known = ", ".join(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
    raise StackError(
      f"inputs={inputs!r} is not in the batch, which has {known}; give inputs=NAME, or a function"
      " of the batch"
    ) from error


def _factory(where: str, layer: Layer, x: Tree, batch: Tree) -> Any:
  """Wraps an NNX class or object, Linen module or function as `rngs -> module`.

  Args:
    where: how messages name the module.
    layer: a module as `LayerStack.from_modules` takes it, and the entries of the batch it wants.
    x: shapes of its input, which a Linen module's parameters follow from.
    batch: shapes of the batch.

  Raises:
    StackError: a Linen class in place of a module, or nothing that could be called.
  """
  module, entries = layer.module, layer.entries
  known = list(batch) if isinstance(batch, Mapping) else []
  for name, entry in entries.items():
    if entry not in known:
      raise StackError(
        f"{where}: {name}={entry!r} is not in the batch, which has {', '.join(map(repr, known))}"
      )
  bound = _bound_apply(module)
  if bound is not None:
    module = bound
  if isinstance(module, nn.Module):
    return linen(module, x, batch=rows_alone(batch), entries=entries)
  if isinstance(module, nnx.Module):
    return _with_entries(Given(module), entries)
  if isinstance(module, type) and issubclass(module, nn.Module):
    raise StackError(f"{where} is the Linen class {module.__name__}; give an instance of it")
  if not callable(module):
    raise StackError(f"{where}: {module!r} is no module, no factory and no function")
  if _is_factory(where, module):
    return _with_entries(lambda rngs: module(rngs=rngs), entries)
  plan = plan_call(where, module, arguments=1, bound=True, entries=entries)
  owner = getattr(module, "__self__", None)
  if isinstance(owner, nnx.Module):
    return Given(Method(owner, module.__name__, plan))
  return lambda rngs: Apply(module, plan)


def _with_entries(factory: Factory, entries: Mapping[str, str]) -> Any:
  """The factory itself, or a `Layer` of it where its module is called with entries of the batch."""
  return Layer(factory, entries) if entries else factory


def _bound_apply(module: Any) -> nn.Module | None:
  """The Linen module bound to its variables that `partial(model.apply, variables)` stands for."""
  if not isinstance(module, functools.partial) or len(module.args) != 1 or module.keywords:
    return None
  model = getattr(module.func, "__self__", None)
  if isinstance(model, nn.Module) and module.func == model.apply:
    bound: nn.Module = model.bind(module.args[0])
    return bound
  return None


def _is_factory(where: str, module: Any) -> bool:
  """Whether a callable makes a module of `rngs`, and does not take x.

  Raises:
    StackError: it takes x and `rngs` as well, so that it is neither a factory nor a layer.
  """
  parameters = _parameters(module)
  if "rngs" not in parameters:
    return False
  given = module.args if isinstance(module, functools.partial) else ()
  others = [
    p
    for name, p in list(parameters.items())[len(given) :]
    if name not in ("rngs", "self")
    and p.default is p.empty
    and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  is_class = isinstance(_innermost(module), type)
  if others and not is_class:
    raise StackError(
      f"{where} takes {others[0].name} and rngs: a factory takes rngs alone, and a layer is given"
      " keys by its context; wrap it: lambda x, context: f(x, rngs=nnx.Rngs(context.key))"
    )
  return True


def _innermost(function: Any) -> Any:
  """The function or class inside `functools.partial`s."""
  while isinstance(function, functools.partial):
    function = function.func
  return function


def _label(module: Any) -> str:
  """The name of a module's class, or of a function, for messages."""
  module = _innermost(module)
  return str(getattr(module, "__name__", type(module).__name__))


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
  """Parameters of a function, or of a class's constructor; none where it does not say.

  Of a `functools.partial`, those that it gives by name have defaults.
  """
  try:
    if isinstance(function, functools.partial):
      inner = _parameters(function.func)
      return {
        name: p.replace(default=None) if name in function.keywords else p
        for name, p in inner.items()
      }
    if isinstance(function, type):
      # The metaclass of NNX classes is called with `*args, **kwargs`; `__init__` has the names.
      found = dict(inspect.signature(function.__init__).parameters)  # type: ignore[misc]
      found.pop("self", None)
      return found
    return inspect.signature(function).parameters
  except (TypeError, ValueError):  # some built-in functions have no signature
    return {}


def _check_loss(loss: Callable[[Tree, Tree], Any], walk: ShapeWalk, batch: Tree) -> None:
  """Traces the loss on what the last module returns.

  Args:
    loss: as `LayerStack.from_modules` takes it.
    walk: behind the last module.
    batch: shapes of the batch.

  Raises:
    StackError: it cannot be called so, or returns neither a loss for every row nor sums.
  """
  y = walk.x
  with called("loss(y, batch), of y which the last module returns,", y):
    jaxpr, out = jax.make_jaxpr(loss, return_shape=True)(y, rows_alone(batch))
  refuse_captured("loss", jaxpr)
  walk.refuse_draws("loss", loss)
  rows, said = leaves_of_rows(batch)[0][1].shape[0], ""
  if isinstance(out, tuple):
    if len(out) != 3 or any(leaf.shape for leaf in jax.tree.leaves(out[:2])):
      said = f"a tuple of {', '.join(str(jax.tree.map(jnp.shape, one)) for one in out)}"
  elif not isinstance(out, jax.ShapeDtypeStruct):
    said = f"a {type(out).__name__}"
  elif not out.shape or out.shape[0] != rows:
    said = f"an array of shape {out.shape}"
  if said:
    raise StackError(
      f"loss returns {said} for {rows} rows; return a loss for every row, or (loss_sum, weight,"
      " metrics), sums over the rows: microbatches are added, and a mean of means is no mean"
    )
  # `sums` refuses a loss in whole numbers, which has no gradient.
  jax.eval_shape(lambda y, batch: sums(Loss(loss)(y, batch)), y, batch)
