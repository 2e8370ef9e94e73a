"""What layers say to each other over the mesh, and nothing where there is none.

A layer is written once. Inside the pipeline its parameters are this device's shards, and what it
calls here communicates; on one device, as in the reference, an axis has one device and every call
returns what it was given. `axes` is always one name or several, taken as one long axis, the first
outermost.

Everything here may stand inside a branch that only some stages take: it waits for the device's own
group alone. `ppermute` is not here, for it waits for all devices.

Derivatives are those of the whole program: where devices along an axis compute the same, each
counts its own loss, and the sum of all of them is divided by the sum of all their weights.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax import lax

Axes = str | Sequence[str]

_hidden = threading.local()


def size(axes: Axes) -> int:
  """Devices along the axes; 1 outside of a mesh."""
  return math.prod(_size(axis) for axis in _names(axes))


def index(axes: Axes) -> jax.Array | int:
  """This device's place along them, int32 []; 0 outside of a mesh."""
  there = _there(axes)
  return lax.axis_index(there) if there else 0


def total(x: jax.Array, axes: Axes) -> jax.Array:
  """The sum over the axes, on every device of them."""
  there = _there(axes)
  return lax.psum(x, there) if there else x


def largest(x: jax.Array, axes: Axes) -> jax.Array:
  """The maximum over the axes; it has no derivative."""
  there = _there(axes)
  x = lax.stop_gradient(x)
  return lax.pmax(x, there) if there else x


def smallest(x: jax.Array, axes: Axes) -> jax.Array:
  """The minimum over the axes; it has no derivative."""
  there = _there(axes)
  x = lax.stop_gradient(x)
  return lax.pmin(x, there) if there else x


def gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
  """Joins the pieces of all devices along `dim`: [..., n, ...] -> [..., n * size, ...]."""
  there = _there(axes)
  return lax.all_gather(x, there, axis=dim, tiled=True) if there else x


def scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
  """Adds over the axes and keeps this device's piece: [..., n * size, ...] -> [..., n, ...]."""
  there = _there(axes)
  return lax.psum_scatter(x, there, scatter_dimension=dim, tiled=True) if there else x


def exchange(x: jax.Array, axes: Axes, split: int, join: int) -> jax.Array:
  """All to all: cuts `split` into a piece for every device, joins what arrives along `join`."""
  there = _there(axes)
  return lax.all_to_all(x, there, split, join, tiled=True) if there else x


@contextlib.contextmanager
def outside(sizes: Mapping[str, int]) -> Iterator[None]:
  """While it lasts, this thread is outside of a mesh of these sizes: asking for one is an error.

  A function traced there would think itself alone and leave out its sums.
  """
  _hidden.sizes = sizes
  try:
    yield
  finally:
    _hidden.sizes = {}


def _size(axis: str) -> int:
  if getattr(_hidden, "sizes", {}).get(axis, 1) > 1:
    raise ValueError(f"a layer that communicates over {axis} cannot be traced off the mesh")
  try:
    return int(lax.axis_size(axis))
  except NameError:  # unbound: there is no mesh, or it lacks the axis
    return 1


def _there(axes: Axes) -> tuple[str, ...]:
  """Those of the axes that have more than one device: XLA would run a sum over one as well."""
  return tuple(axis for axis in _names(axes) if _size(axis) > 1)


def _names(axes: Axes) -> Sequence[str]:
  return (axes,) if isinstance(axes, str) else axes
