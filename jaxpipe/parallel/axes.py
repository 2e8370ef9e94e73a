"""Sums, gathers and exchanges over mesh axes for layers, which do nothing where there is no mesh.

A layer is written once and runs in two settings. Inside the pipeline's `shard_map` its parameters
are one device's shards, and what it calls here communicates. On one device, as in the unpipelined
reference or in `init`, an axis counts as one device and every function returns what it was given.
The arguments `axes` are one name or several; several are taken as one long axis, the first
outermost.

    y = axes.total(self.down(nnx.gelu(self.up(x))), "tensor")    # two matrices cut over `tensor`

*No rendezvous of all devices.* These functions may stand inside a branch that only some stages
take, because each waits for its own group of devices alone. `ppermute` is not among them: it waits
for every pair of the program, those of other stages included, and would dead-lock.

*Types.* The executor's `shard_map` runs with `check_vma=True`, where the type of a value says over
which axes it *varies* (devices may hold different arrays). The executor casts parameters, buffers
and activations to vary over all six axes, also where devices hold equal arrays. JAX then derives
the right communication for the backward pass: the transpose of a sum over an axis is a sum of the
cotangents over it.

*Derivatives* are those of the whole program. Where devices along an axis compute the same, each
counts its own copy of the loss, and also of the weight that the executor divides by at the end:
t times too much in both, which cancels.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax import lax

Axes = str | Sequence[str]

# Its field `sizes`, of this thread, is the mesh that `outside` was given, for as long as it lasts.
_hidden = threading.local()


def size(axes: Axes) -> int:
  """Returns the number of devices along the axes; 1 outside of a mesh."""
  return math.prod(_size(axis) for axis in _names(axes))


def index(axes: Axes) -> jax.Array | int:
  """Returns this device's number along the axes, int32 [] in [0, size); 0 outside of a mesh."""
  names = _longer_than_one(axes)
  return lax.axis_index(names) if names else 0


def total(x: jax.Array, axes: Axes) -> jax.Array:
  """Returns the sum of x over the devices along the axes, on each of them (all-reduce)."""
  names = _longer_than_one(axes)
  return lax.psum(x, names) if names else x


def largest(x: jax.Array, axes: Axes) -> jax.Array:
  """Returns the elementwise maximum of x over the axes, on each device; it has no derivative."""
  names = _longer_than_one(axes)
  # Off the mesh as well, so that one device has the same derivative; `pmax` itself has none.
  x = lax.stop_gradient(x)
  return lax.pmax(x, names) if names else x


def smallest(x: jax.Array, axes: Axes) -> jax.Array:
  """Returns the elementwise minimum of x over the axes, on each device; it has no derivative."""
  names = _longer_than_one(axes)
  x = lax.stop_gradient(x)
  return lax.pmin(x, names) if names else x


def gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
  """Joins the pieces of all devices along a dim (all-gather).

  Args:
    x: [..., n, ...], this device's piece.
    axes: mesh axes over which the dim is cut.
    dim: the dim to join along.

  Returns:
    [..., n * size, ...], the pieces in the order of the devices' numbers.
  """
  names = _longer_than_one(axes)
  return lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
  """Adds over the axes and keeps this device's piece of the sum (reduce-scatter).

  Args:
    x: [..., n * size, ...], this device's summand.
    axes: mesh axes to add over.
    dim: the dim that the sum is cut along.

  Returns:
    [..., n, ...].
  """
  names = _longer_than_one(axes)
  return lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True) if names else x


def exchange(x: jax.Array, axes: Axes, split: int, join: int) -> jax.Array:
  """Sends each device its piece of x, and joins what arrives (all-to-all).

  Args:
    x: [...], whose dim `split` the number of devices divides.
    axes: mesh axes over whose devices the pieces go.
    split: the dim that is cut into one piece for every device.
    join: the dim along which the pieces that arrive are joined, in the order of the senders.

  Returns:
    x with dim `split` divided by the number of devices, and dim `join` multiplied by it.
  """
  names = _longer_than_one(axes)
  return lax.all_to_all(x, names, split, join, tiled=True) if names else x


@contextlib.contextmanager
def outside(sizes: Mapping[str, int]) -> Iterator[None]:
  """While it lasts, asking for an axis of more than one device is an error, in this thread.

  The pipeline traces parts of a layer outside of its `shard_map`. A function that communicates
  would see one device there, and its sums would silently be left out of the trace.

  Args:
    sizes: mesh axis -> number of devices, of the mesh on which the layer will run.
  """
  _hidden.sizes = sizes
  try:
    yield
  finally:
    _hidden.sizes = {}


def _size(axis: str) -> int:
  """Number of devices along one axis of the mesh that surrounds the caller, or 1."""
  if getattr(_hidden, "sizes", {}).get(axis, 1) > 1:
    raise ValueError(f"a layer that communicates over {axis} cannot be traced off the mesh")
  try:
    return int(lax.axis_size(axis))
  except NameError:  # unbound: there is no mesh, or it lacks the axis
    return 1


def _longer_than_one(axes: Axes) -> tuple[str, ...]:
  """Drops axes of one device, over which a collective would do nothing and still be compiled."""
  return tuple(axis for axis in _names(axes) if _size(axis) > 1)


def _names(axes: Axes) -> Sequence[str]:
  """The axes as a sequence, given one name or several."""
  return (axes,) if isinstance(axes, str) else axes
