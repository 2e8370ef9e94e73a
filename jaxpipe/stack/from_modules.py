"""Any modules in a row as the parts of a stack: NNX, Linen or plain functions, shapes inferred."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxpipe.stack.linen import linen
from jaxpipe.stack.module_spec import Factory, ModuleSpec, StackError, called, sums
from jaxpipe.stack.network import shape_after

Tree = Any


def parts_of_modules(
  modules: Sequence[Any],
  loss: Callable[[Tree, Tree], Any],
  batch: Tree,
  inputs: str | Callable[[Tree], Tree],
  trainable: Any,
) -> tuple[Factory, list[Factory], Factory, dict[str, str]]:
  """Embedding, layers, head, and ties of modules that stand twice.

  Arguments and errors as of `LayerStack.from_modules`.
  """
  select = inputs if callable(inputs) else _entry(inputs)
  x = _input_shapes(select, inputs, batch)
  layers: list[Factory] = []
  first: dict[int, int] = {}
  tied: dict[str, str] = {}
  for i, module in enumerate(modules):
    name = f"layers[{i}]"
    factory = _factory(name, module, x, batch)
    layers.append(factory)
    with called(f"{name} ({_called(module)})", x, "cannot be made for"):
      spec = ModuleSpec.trace(name, factory, trainable)
    x = shape_after(spec, x, batch)
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
  """What of the batch goes into the first module."""

  def __init__(self, select: Callable[[Tree], Tree]) -> None:
    self._select = select

  def __call__(self, batch: Tree) -> Tree:
    return self._select(batch)


class Apply(nnx.Module):
  """A plain function as a module."""

  def __init__(self, function: Callable[..., Tree]) -> None:
    self._function = function

  def __call__(self, x: Tree) -> Tree:
    return self._function(x)


class Loss(nnx.Module):
  """A head without parameters."""

  def __init__(self, loss: Callable[[Tree, Tree], Any]) -> None:
    self._loss = loss

  def __call__(self, y: Tree, batch: Tree) -> Any:
    out = self._loss(y, batch)
    if isinstance(out, tuple):
      return out
    wide = jnp.promote_types(out.dtype, jnp.float32)  # a count that float16 cannot hold
    return jnp.sum(out, dtype=wide), jnp.asarray(out.size, wide), {}


def _entry(name: str) -> Callable[[Tree], Tree]:
  return lambda batch: batch[name]


def _input_shapes(select: Callable[[Tree], Tree], inputs: Any, batch: Tree) -> Tree:
  try:
    return jax.eval_shape(select, batch)
  except (KeyError, TypeError, IndexError) as error:
    known = ", ".join(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
    raise StackError(
      f"inputs={inputs!r} is not in the batch, which has {known}; give inputs=NAME, or a function"
      " of the batch"
    ) from error


def _factory(name: str, module: Any, x: Tree, batch: Tree) -> Factory:
  """What makes the module, whatever it was given as."""
  if isinstance(module, nn.Module):
    return linen(module, x, batch=batch)
  if isinstance(module, nnx.Module):
    graph, state = nnx.split(module)
    return lambda rngs: nnx.merge(graph, state)
  if isinstance(module, type) and issubclass(module, nn.Module):
    raise StackError(f"{name} is the Linen class {module.__name__}; give an instance of it")
  if not callable(module):
    raise StackError(f"{name} is {module!r}: no module, no factory and no function")
  if "rngs" in _parameters(module):
    return lambda rngs: module(rngs=rngs)
  return lambda rngs: Apply(module)


def _called(module: Any) -> str:
  """The class or function of a module, as messages name it."""
  while isinstance(module, functools.partial):
    module = module.func
  return str(getattr(module, "__name__", type(module).__name__))


def _parameters(function: Any) -> Sequence[str]:
  """Names of a function's parameters; of a class, of what makes one of it."""
  while isinstance(function, functools.partial):
    function = function.func
  try:
    if isinstance(function, type):  # a class of NNX says of its call that it takes anything
      function = function.__init__  # type: ignore[misc]
    return list(inspect.signature(function).parameters)
  except (TypeError, ValueError):  # some built-in functions say nothing of theirs
    return []


def _check_loss(loss: Callable[[Tree, Tree], Any], y: Tree, batch: Tree) -> None:
  with called("loss(y, batch), of y which the last module returns,", y):
    out = jax.eval_shape(loss, y, batch)
  rows, said = jax.tree.leaves(batch)[0].shape[0], ""
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
  jax.eval_shape(lambda y, batch: sums(Loss(loss)(y, batch)), y, batch)  # refuses whole numbers
