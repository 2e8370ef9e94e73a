"""Traces one layer on shapes: what it returns, what it reads from outside, and what it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.stack.context import Context, LayerInputs, leaves_of_rows, map_entries
from jaxpipe.stack.errors import StackError, called
from jaxpipe.stack.module.captured import refuse_captured
from jaxpipe.stack.module.row_keys import Draws, draws_any, draws_of
from jaxpipe.stack.module_spec import ModuleSpec

Tree = Any


def layer_output(spec: ModuleSpec, x: Tree, batch: Tree) -> Tree:
  """Shapes of what a layer returns for x; on the way, it is seen what the layer draws.

  Args:
    spec: the layer.
    x: arrays or shapes, leaves [rows, ...].
    batch: likewise, leaves [B, ...].

  Raises:
    StackError: it raises an error of shapes or types; it reads weights that are no variables of it;
      or it draws random numbers that would depend on the mesh.
  """
  rows = rows_of(batch)
  name = f"{spec.name} ({spec.label})"
  with called(name, x):
    jaxpr, y = jax.make_jaxpr(layer_call(spec, rows), return_shape=True)(
      spec.shapes, spec.state, x, batch
    )
  refuse_captured(name, jaxpr)
  if not spec.draws and not draws_any(jaxpr):
    spec.draws.append(Draws())
  elif not spec.draws:
    more = [_with_rows(tree, rows, rows + 1) for tree in (x, batch)]
    larger = jax.make_jaxpr(layer_call(spec, rows + 1))(spec.shapes, spec.state, *more)
    spec.draws.append(draws_of(jaxpr, larger, rows, name))
  return y


def layer_call(spec: ModuleSpec, rows: int) -> Callable[..., Tree]:
  """A layer's training call, `(params, state, x, batch) -> y`, for so many rows."""

  def call(params: Tree, state: Tree, x: Tree, batch: Tree) -> Tree:
    key, number = jax.random.key(0), jnp.int32(0)
    inputs = LayerInputs(
      batch=batch, key=key, layer=number, microbatch=number, rows=jnp.arange(rows)
    )
    return spec.run(params, state, True, x, context=Context.create(True, **inputs))[0]

  return call


def _with_rows(tree: Tree, rows: int, others: int) -> Tree:
  """Shapes of a tree for another number of rows."""

  def resized(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = leaf.shape
    return jax.ShapeDtypeStruct((others, *shape[1:]) if shape[:1] == (rows,) else shape, leaf.dtype)

  return map_entries(resized, lambda entry: entry, tree)


def rows_of(batch: Tree) -> int:
  """Rows of a batch, which x cannot tell: it may have leaves without rows, such as a scalar loss.

  Raises:
    StackError: the batch has no leaves with rows.
  """
  for _, leaf in leaves_of_rows(batch):
    return int(jnp.shape(leaf)[0])
  raise StackError("no leaf of the batch has rows; give it one that is [B, ...]")
