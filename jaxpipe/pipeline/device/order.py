"""Puts work in an order that data alone would not give it.

XLA runs what it likes first of all that does not wait for data. Where one thing must be done before
another, a number is computed from the one, and the other passes a `select` on it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxpipe.pipeline.storage.rings import Tree


def blocks(mesh: Mesh) -> bool:
  """Whether a device of the mesh that waits in a transfer works on nothing else, as CPUs do."""
  return bool(mesh.devices.flat[0].platform == "cpu")


def after(made: Tree, held: Tree) -> Tree:
  """Returns `held`, bit by bit, which XLA cannot use before all of `made` is there."""
  # No number is above infinity, and neither is NaN.
  return hold(touch(made) > jnp.inf, held)


def touch(made: Tree) -> jax.Array:
  """One number for which every leaf must be there; its value means nothing."""
  # Behind the barrier, or XLA would compute the one element of each leaf in place of all of it.
  leaves = lax.optimization_barrier([leaf for leaf in jax.tree.leaves(made) if leaf.size])
  corners = [lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()) for x in leaves]
  return sum((corner.real.astype(jnp.float32) for corner in corners), jnp.float32(0))


def hold(never: jax.Array, held: Tree) -> Tree:
  """The leaves, which XLA cannot use before it knows that `never` is false."""
  # Adding a zero would turn -0.0 into 0.0.
  return jax.tree.map(lambda leaf: jnp.where(never, jnp.zeros_like(leaf), leaf), held)
