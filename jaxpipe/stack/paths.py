"""Leaves of nested dicts by their `/`-joined paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Tree = Any


def get_path(tree: Tree, path: str) -> Any:
  """The leaf, or None where there is none."""
  for name in path.split("/"):
    tree = tree.get(_key(tree, name)) if isinstance(tree, Mapping) else None
  return tree


def set_path(tree: Tree, path: str, value: Any) -> Tree:
  """A tree with another leaf there."""
  name, _, rest = path.partition("/")
  key = _key(tree, name)
  return {**tree, key: set_path(tree.get(key, {}), rest, value) if rest else value}


def without(tree: Tree, paths: Iterable[str]) -> Tree:
  """A tree without these leaves."""
  for path in paths:
    name, _, rest = path.partition("/")
    key = _key(tree, name)
    tree = {k: v for k, v in tree.items() if k != key or rest}
    if rest:
      tree = {**tree, key: without(tree[key], [rest])}
  return tree


def merged(a: Tree, b: Tree) -> Tree:
  """A nested dict with the leaves of two that have none in common."""
  if not isinstance(a, Mapping) or not isinstance(b, Mapping):
    raise ValueError(f"both trees have a leaf at the same place: {a}, {b}")
  return {
    **a,
    **{k: merged(a[k], v) if k in a else v for k, v in b.items()},
  }


def leaf_paths(tree: Tree, path: str = "") -> list[str]:
  """Paths of all leaves below a path that is there, itself where it is a leaf."""
  if not isinstance(tree, Mapping):
    return [path]
  return [
    leaf for k, v in tree.items() for leaf in leaf_paths(v, f"{path}/{k}" if path else f"{k}")
  ]


def _key(tree: Mapping[Any, Any], name: str) -> Any:
  """What a part of a path is called in the tree: Flax numbers the entries of lists."""
  return int(name) if name.isdecimal() and not any(isinstance(key, str) for key in tree) else name
