"""Leaves that have a gradient, among those that have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def is_float(leaf: Any) -> bool:
  """Whether a leaf has a gradient."""
  return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def float_leaves(tree: Tree) -> list[Any]:
  """The leaves that have a gradient, in order."""
  return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_float_leaves(tree: Tree, floats: Sequence[jax.Array]) -> Tree:
  """`tree` with its float leaves replaced."""
  leaves, structure = jax.tree.flatten(tree)
  new = iter(floats)
  return jax.tree.unflatten(structure, [next(new) if is_float(leaf) else leaf for leaf in leaves])
