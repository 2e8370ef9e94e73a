"""Leaves of nested dicts by their `/`-joined paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Tree = Any


def get_path(tree: Tree, path: str) -> Any:
  """The leaf, or None where there is none."""
  for name in path.split("/"):
    tree = tree.get(name) if isinstance(tree, Mapping) else None
  return tree


def set_path(tree: Tree, path: str, value: Any) -> Tree:
  """A tree with another leaf there."""
  name, _, rest = path.partition("/")
  return {**tree, name: set_path(tree.get(name, {}), rest, value) if rest else value}


def without(tree: Tree, paths: Iterable[str]) -> Tree:
  """A tree without these leaves."""
  for path in paths:
    name, _, rest = path.partition("/")
    tree = {k: v for k, v in tree.items() if k != name or rest}
    if rest:
      tree = {**tree, name: without(tree[name], [rest])}
  return tree
