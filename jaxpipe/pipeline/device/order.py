"""Puts work in an order that data dependencies alone would not give it.

XLA may run in any order what does not wait for data. Where one thing must be finished before
another begins, this module makes a dependency: one number is computed from all arrays of the first,
and the arrays of the second pass a `select` whose predicate is that number. The select always takes
the same side, which the compiler cannot know.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxpipe.pipeline.storage.rings import Tree


def blocks(mesh: Mesh) -> bool:
  """Whether a device of the mesh that waits in a transfer works on nothing else, as CPUs do.

  A CPU device executes a collective permute on its own thread and blocks there until its neighbour
  has come; accelerators transfer beside their arithmetic.
  """
  return bool(mesh.devices.flat[0].platform == "cpu")


def after(made: Tree, held: Tree) -> Tree:
  """Returns `held`, bit for bit, which XLA cannot use before all of `made` has been computed."""
  # No number is above infinity, and neither is NaN: the predicate is false whatever the values are.
  return hold(touch(made) > jnp.inf, held)


def touch(made: Tree) -> jax.Array:
  """Returns a number that depends on every leaf; its value means nothing.

  One element of each leaf is enough, since XLA computes a leaf as a whole.
  """
  # Without the barrier, XLA would push the slice up and compute that one element alone.
  leaves = lax.optimization_barrier([leaf for leaf in jax.tree.leaves(made) if leaf.size])
  corners = [lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()) for x in leaves]
  return sum((corner.real.astype(jnp.float32) for corner in corners), jnp.float32(0))


def hold(never: jax.Array, held: Tree) -> Tree:
  """Returns `held`, whose leaves XLA cannot use before it knows that `never` is false."""
  # A select and not an addition of zero, which would turn -0.0 into 0.0.
  return jax.tree.map(lambda leaf: jnp.where(never, jnp.zeros_like(leaf), leaf), held)
