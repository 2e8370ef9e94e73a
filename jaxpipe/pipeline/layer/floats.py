"""Tells the leaves of a tree that have a gradient (floats) from those that have none.

What travels between stages may hold integers and booleans beside floats (token numbers, masks). All
leaves travel forwards; backwards only the float leaves have cotangents, kept as a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def is_float(leaf: Any) -> bool:
  """Whether a leaf, an array or anything with a dtype, has a gradient: floats and complex do."""
  return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def float_leaves(tree: Tree) -> list[Any]:
  """The leaves of `tree` that have a gradient, in the tree's order."""
  return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_float_leaves(tree: Tree, floats: Sequence[jax.Array]) -> Tree:
  """Returns `tree` with its float leaves replaced.

  Args:
    tree: any tree of arrays.
    floats: one value for each of `float_leaves(tree)`, in that order.
  """
  leaves, structure = jax.tree.flatten(tree)
  new = iter(floats)
  return jax.tree.unflatten(structure, [next(new) if is_float(leaf) else leaf for leaf in leaves])
