"""Ring buffers: arrays with numbered slots, which values occupy one after the other.

The loop over ticks carries a few rings (`table/program.py` lists them). A ring is a tree of arrays
whose leading dim counts slots; the tick table says which slot an action reads and which slot takes
what arrives. The same functions serve any array indexed by its leading dims: pools `[cells, layers,
...]`, stacked parameters `[layers, ...]`, a batch `[M, rows, ...]`.

    get, put       read and write one slot
    load, store    read and write what one action leaves for another, in row-major order
    add            adds to one slot
    allocate       a ring of undefined contents

XLA copies a buffer whole if it cannot prove that it may update it in place
(docs/decisions/0001-tick-table.md): reads are a `dynamic_slice`, writes a `dynamic_update_slice` of
one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxpipe.pipeline.layer.varying import axes_of, vary

Tree = Any
# A slot, cell or layer: a Python int, or a traced int32 scalar.
Index = int | jax.Array


def allocate(shapes: Tree, slots: int, axes: Sequence[str], poison: bool) -> Tree:
  """Returns a ring whose contents nobody has written.

  They are undefined, for nothing reads a slot before it is filled, and filling rings with zeros
  costs tens of millions of cycles a step. Tests see by `poison` whether that is true.

  Args:
    shapes: tree of shapes and dtypes, of one slot.
    slots: number of slots.
    axes: mesh axes over which the ring varies.
    poison: fill float leaves with NaN.

  Returns:
    The tree of `shapes`, leaves `[slots, ...]`.
  """

  def ring(leaf: Any) -> jax.Array:
    shape = (slots, *leaf.shape)
    if poison and jnp.issubdtype(leaf.dtype, jnp.inexact):
      return jnp.full(shape, jnp.nan, leaf.dtype)
    return lax.empty(shape, leaf.dtype)

  return vary(jax.tree.map(ring, shapes), axes)


def get(ring: Tree, *index: Index) -> Tree:
  """Reads one slot.

  Args:
    ring: tree of arrays.
    index: where the slot lies along the leading dims, one number for each dim.

  Returns:
    The tree with those leading dims dropped: of a leaf `[slots, layers, ...]`, `get(ring, slot)` is
    `[layers, ...]` and `get(ring, slot, layer)` is `[...]`.
  """

  def read(leaf: jax.Array) -> jax.Array:
    inner = leaf.shape[len(index) :]
    start = _start(index, len(inner))
    return lax.dynamic_slice(leaf, start, (*(1 for _ in index), *inner)).reshape(inner)

  return jax.tree.map(read, ring)


def put(ring: Tree, value: Tree, *index: Index) -> Tree:
  """Writes one slot, in place where XLA can; inside the executor's loop it must.

  Args:
    ring: tree of arrays.
    value: tree of the same structure, leaves without the leading dims that `index` counts.
    index: where the slot lies along the leading dims.

  Returns:
    The ring with that slot replaced.
  """

  def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
    start = _start(index, new.ndim)
    # A sum over a mesh axis does not vary along it, and the ring does: JAX wants equal types.
    new = vary(new, axes_of([leaf]))
    return lax.dynamic_update_slice(leaf, new.reshape(*(1 for _ in index), *new.shape), start)

  return jax.tree.map(write, ring, value)


def load(ring: Tree, *index: Index) -> Tree:
  """Reads one slot like `get`, for what one action has left for another: in row-major order."""
  return _row_major(get(ring, *index))


def store(ring: Tree, value: Tree, *index: Index) -> Tree:
  """Writes one slot like `put`, for what one action leaves for another: in row-major order."""
  return put(ring, _row_major(value), *index)


def _row_major(tree: Tree) -> Tree:
  """Constrains every leaf to the order of dims in memory in which rings lie.

  XLA chooses an array's layout by who reads it. W reads a saved activation transposed, I reads it
  straight, and both lie in one pool, which XLA then converted whole between the two actions. With
  what goes in and what comes out constrained, the pool keeps one layout and a reader that wants
  another converts its own slice. On CPU, pools keep their order anyway, and the constraint would
  copy what is read (docs/decisions/0011-row-major-pools.md).
  """

  def one(leaf: jax.Array) -> jax.Array:
    order = Layout(tuple(range(leaf.ndim)))

    def constrained(leaf: jax.Array) -> jax.Array:
      return with_layout_constraint(leaf, order)

    # Chosen when the program is lowered: it may be traced on one platform for another.
    laid: jax.Array = lax.platform_dependent(leaf, cpu=lambda leaf: leaf, default=constrained)
    return laid

  return jax.tree.map(one, tree)


def add(ring: Tree, value: Tree, *index: Index) -> Tree:
  """Adds to one slot, in the ring's own dtype; arguments and result are those of `put`."""
  old = get(ring, *index)
  return put(ring, jax.tree.map(lambda a, b: a + b.astype(a.dtype), old, value), *index)


def _start(index: Sequence[Index], rest: int) -> list[jax.Array]:
  """Returns the start of a slice: `index`, then zeros for the `rest` dims, all of one dtype."""
  # `dynamic_slice` wants one dtype of all, and Python ints would be int64 under x64.
  return [jnp.asarray(i, jnp.int32) for i in (*index, *(0 for _ in range(rest)))]


def wide(dtype: Any) -> Any:
  """Returns the dtype in which values of a dtype are summed: float32 or int32 at least.

  Flags and counts are summed as int32, whatever narrower type they have.
  """
  least = jnp.float32 if jnp.issubdtype(dtype, jnp.inexact) else jnp.int32
  return jnp.promote_types(dtype, least)
