"""Leaves of nested dicts by `/`-joined paths, such as `inner/kernel`.

Ties, tables over the vocabulary and messages name parameters by paths. The trees are nested dicts,
as `nnx.to_pure_dict` makes them; their keys are names, or whole numbers where Flax numbers the
entries of a list. A path writes both alike: `tables/0`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Tree = Any


def get_path(tree: Tree, path: str) -> Any:
  """The leaf or subtree at a path, or None where there is none."""
  for name in path.split("/"):
    tree = tree.get(_key(tree, name)) if isinstance(tree, Mapping) else None
  return tree


def set_path(tree: Tree, path: str, value: Any) -> Tree:
  """A copy of a tree with `value` at a path; dicts that are missing on the way are made."""
  name, _, rest = path.partition("/")
  key = _key(tree, name)
  return {**tree, key: set_path(tree.get(key, {}), rest, value) if rest else value}


def without(tree: Tree, paths: Iterable[str]) -> Tree:
  """A copy of a tree that lacks the leaves at these paths; dicts that become empty stay."""
  for path in paths:
    name, _, rest = path.partition("/")
    key = _key(tree, name)
    tree = {k: v for k, v in tree.items() if k != key or rest}
    if rest:
      tree = {**tree, key: without(tree[key], [rest])}
  return tree


def merged(a: Tree, b: Tree) -> Tree:
  """A nested dict with the leaves of both.

  Raises:
    ValueError: both have a leaf at the same path.
  """
  if not isinstance(a, Mapping) or not isinstance(b, Mapping):
    raise ValueError(f"both trees have a leaf at the same place: {a}, {b}")
  return {
    **a,
    **{k: merged(a[k], v) if k in a else v for k, v in b.items()},
  }


def leaf_paths(tree: Tree, path: str = "") -> list[str]:
  """Paths of all leaves of a tree, each behind the prefix `path`; of a leaf alone, the prefix."""
  if not isinstance(tree, Mapping):
    return [path]
  return [
    leaf for k, v in tree.items() for leaf in leaf_paths(v, f"{path}/{k}" if path else f"{k}")
  ]


def _key(tree: Mapping[Any, Any], name: str) -> Any:
  """The key that one name of a path stands for: a number where all keys of the dict are numbers."""
  return int(name) if name.isdecimal() and not any(isinstance(key, str) for key in tree) else name
