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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxpipe.stack.context import Filled, leaves_of_rows, rows_alone
from jaxpipe.stack.linen import linen
from jaxpipe.stack.module_spec import Factory, ModuleSpec, StackError, called, sums
from jaxpipe.stack.network import layer_output

Tree = Any


def factories_of(
  modules: Sequence[Any],
  loss: Callable[[Tree, Tree], Any],
  batch: Tree,
  inputs: str | Callable[[Tree], Tree],
  trainable: Any,
) -> tuple[Factory, list[Factory], Factory, dict[str, str]]:
  """Factories of an embedding, of the layers and of a head, and ties of modules that stand twice.

  Args:
    modules: NNX modules, classes or factories, Linen modules, or functions of x.
    loss: `loss(y, batch)`, of what the last module returns.
    batch: an example batch or its shapes, leaves [B, ...].
    inputs: which entry of the batch goes into the first module, or a function of the batch.
    trainable: NNX filter of the variables that are parameters.

  Returns:
    `embed, layers, head, tied`, arguments of `LayerStack`. The embedding and the head have no
    parameters. `tied` maps `layers/i` to the place where the same module stood first.

  Raises:
    StackError: a module that cannot take what the one before returns, or stands twice although it
      has state; a loss without rows; `inputs` that is not in the batch.
  """
  select = inputs if callable(inputs) else _entry(inputs)
  x = _input_shapes(select, inputs, batch)
  layers: list[Factory] = []
  # A module that is given as an object and stands twice shares its weights: id -> first place.
  first: dict[int, int] = {}
  tied: dict[str, str] = {}
  for i, module in enumerate(modules):
    name = f"layers[{i}]"
    factory = _factory(name, module, x, batch)
    layers.append(factory)
    with called(f"{name} ({_label(module)})", x, "cannot be made for"):
      spec = ModuleSpec.trace(name, factory, trainable)
    x = layer_output(spec, x, batch)
    if isinstance(module, nnx.Module) and first.setdefault(id(module), i) != i:
      if spec.state:
        raise StackError(
          f"{name} is layers[{first[id(module)]}] again, which has state; make it one of its own"
        )
      if jax.tree.leaves(spec.shapes):
        tied[f"layers/{i}"] = f"layers/{first[id(module)]}"
  _check_loss(loss, x, batch)
  return (lambda rngs: Select(select)), layers, (lambda rngs: Loss(loss)), tied


class Select(nnx.Module):
  """An embedding without parameters: picks what of the batch goes into the first module."""

  def __init__(self, select: Callable[[Tree], Tree]) -> None:
    self._select = select

  def __call__(self, batch: Tree) -> Tree:
    return self._select(rows_alone(batch))


class Apply(nnx.Module):
  """A plain function of x as a module without variables."""

  def __init__(self, function: Callable[..., Tree]) -> None:
    self._function = function

  def __call__(self, x: Tree) -> Tree:
    return self._function(x)


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


def _entry(name: str) -> Callable[[Tree], Tree]:
  """The function of a batch that picks one entry."""
  return lambda batch: batch[name]


def _input_shapes(select: Callable[[Tree], Tree], inputs: Any, batch: Tree) -> Tree:
  """Shapes of the first module's x.

  Raises:
    StackError: the batch has no such entry; names those that it has.
  """
  try:
    return jax.eval_shape(select, rows_alone(batch))
  except (KeyError, TypeError, IndexError) as error:
    known = ", ".join(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
    raise StackError(
      f"inputs={inputs!r} is not in the batch, which has {known}; give inputs=NAME, or a function"
      " of the batch"
    ) from error


def _factory(name: str, module: Any, x: Tree, batch: Tree) -> Factory:
  """Wraps an NNX class or object, Linen module or function as `rngs -> module`.

  Args:
    name: how messages name the module.
    module: as `LayerStack.from_modules` takes it.
    x: shapes of its input, which a Linen module's parameters follow from.
    batch: shapes of the batch.

  Raises:
    StackError: a Linen class in place of a module, or nothing that could be called.
  """
  if isinstance(module, nn.Module):
    return linen(module, x, batch=rows_alone(batch))
  if isinstance(module, nnx.Module):
    # `init` starts from the values that the module has now.
    graph, state = nnx.split(module)
    return lambda rngs: nnx.merge(graph, state)
  if isinstance(module, type) and issubclass(module, nn.Module):
    raise StackError(f"{name} is the Linen class {module.__name__}; give an instance of it")
  if not callable(module):
    raise StackError(f"{name} is {module!r}: no module, no factory and no function")
  if "rngs" in _parameters(module):
    return lambda rngs: module(rngs=rngs)
  return lambda rngs: Apply(module)


def _label(module: Any) -> str:
  """The name of a module's class, or of a function, for messages."""
  while isinstance(module, functools.partial):
    module = module.func
  return str(getattr(module, "__name__", type(module).__name__))


def _parameters(function: Any) -> Sequence[str]:
  """Names of a function's parameters, or of a class's constructor; none where it does not say."""
  while isinstance(function, functools.partial):
    function = function.func
  try:
    if isinstance(function, type):
      # The metaclass of NNX classes is called with `*args, **kwargs`; `__init__` has the names.
      function = function.__init__  # type: ignore[misc]
    return list(inspect.signature(function).parameters)
  except (TypeError, ValueError):  # some built-in functions have no signature
    return []


def _check_loss(loss: Callable[[Tree, Tree], Any], y: Tree, batch: Tree) -> None:
  """Traces the loss on what the last module returns.

  Args:
    loss: as `LayerStack.from_modules` takes it.
    y: shapes of what the last module returns.
    batch: shapes of the batch.

  Raises:
    StackError: it cannot be called so, or returns neither a loss for every row nor sums.
  """
  with called("loss(y, batch), of y which the last module returns,", y):
    out = jax.eval_shape(loss, y, rows_alone(batch))
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
