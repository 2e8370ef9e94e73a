"""Buffers with numbered slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxpipe.pipeline.layer.varying import axes_of, vary

Tree = Any
Index = int | jax.Array


def allocate(shapes: Tree, slots: int, axes: Sequence[str], poison: bool) -> Tree:
  """A ring of `slots` slots, each with the leaves of `shapes`.

  Its contents are undefined (nothing reads a slot before it is filled, and zero-filling rings costs
  tens of millions of cycles a step), or NaN with `poison`, so that tests see whether that is true.
  """

  def ring(leaf: Any) -> jax.Array:
    shape = (slots, *leaf.shape)
    if poison and jnp.issubdtype(leaf.dtype, jnp.inexact):
      return jnp.full(shape, jnp.nan, leaf.dtype)
    return lax.empty(shape, leaf.dtype)

  return vary(jax.tree.map(ring, shapes), axes)


def get(ring: Tree, *index: Index) -> Tree:
  """Reads one slot: the leading dims at `index`, dropped."""

  def read(leaf: jax.Array) -> jax.Array:
    inner = leaf.shape[len(index) :]
    start = _start(index, len(inner))
    return lax.dynamic_slice(leaf, start, (*(1 for _ in index), *inner)).reshape(inner)

  return jax.tree.map(read, ring)


def put(ring: Tree, value: Tree, *index: Index) -> Tree:
  """Writes one slot, in place where XLA can (inside the executor's loop it must)."""

  def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
    start = _start(index, new.ndim)
    new = vary(new, axes_of([leaf]))  # a sum over an axis does not vary along it
    return lax.dynamic_update_slice(leaf, new.reshape(*(1 for _ in index), *new.shape), start)

  return jax.tree.map(write, ring, value)


def load(ring: Tree, *index: Index) -> Tree:
  """`get`, for what one action leaves for a later one: the ring keeps its layout."""
  return _row_major(get(ring, *index))


def store(ring: Tree, value: Tree, *index: Index) -> Tree:
  """`put`, for what one action leaves for a later one."""
  return put(ring, _row_major(value), *index)


def _row_major(tree: Tree) -> Tree:
  """The tree, each leaf laid out as rings are.

  Left to itself, XLA lays a ring out as the action that reads it likes best, and converts all of it
  between actions that like different layouts. On CPU it does not, and the constraint would copy.
  """

  def one(leaf: jax.Array) -> jax.Array:
    order = Layout(tuple(range(leaf.ndim)))
    constrain = lambda leaf: with_layout_constraint(leaf, order)  # noqa: E731
    laid: jax.Array = lax.platform_dependent(leaf, cpu=lambda leaf: leaf, default=constrain)
    return laid

  return jax.tree.map(one, tree)


def add(ring: Tree, value: Tree, *index: Index) -> Tree:
  """Adds to one slot, in the ring's own precision."""
  old = get(ring, *index)
  return put(ring, jax.tree.map(lambda a, b: a + b.astype(a.dtype), old, value), *index)


def _start(index: Sequence[Index], rest: int) -> list[jax.Array]:
  """All of one type, whatever the width of default integers."""
  return [jnp.asarray(i, jnp.int32) for i in (*index, *(0 for _ in range(rest)))]


def wide(dtype: Any) -> Any:
  """The dtype in which a dtype is summed: float32 at least, and int32 for flags and counts."""
  least = jnp.float32 if jnp.issubdtype(dtype, jnp.inexact) else jnp.int32
  return jnp.promote_types(dtype, least)
