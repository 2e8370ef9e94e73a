"""Parameters that are another module's own: which they are, and how they are found by their paths.

A tied parameter exists once, in the tree of its *owner*. Paths are `/`-joined and begin with the
name of a module, as `head/table` and `embed/table` do in `{"head/table": "embed/table"}`: the head
reads the embedding's table, and the head's own tree lacks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module_spec import ModuleSpec, same_shapes
from jaxpipe.stack.paths import get_path, leaf_paths

Tree = Any


def ties_of_leaves(specs: Mapping[str, ModuleSpec], tied: Mapping[str, str]) -> dict[str, str]:
  """Ties between single leaves, out of ties between leaves or whole subtrees.

  Raises:
    StackError: a path that is not there, leaves that differ, or an owner that is tied itself.
  """
  shapes = {name: spec.shapes for name, spec in specs.items()}
  states = {name: spec.state for name, spec in specs.items()}
  ties: dict[str, str] = {}
  for theirs, ours in tied.items():
    a, b = _find(shapes, theirs), _find(shapes, ours)
    if a is None and b is None and _find(states, theirs) is not None:
      raise StackError(f"tied: {theirs} is not trained, and only what is trained can be tied")
    paths_a, paths_b = ({*leaf_paths(tree)} if tree is not None else None for tree in (a, b))
    if paths_a is None or paths_a != paths_b or not same_shapes(a, b):
      raise StackError(f"tied: {theirs} is {a}, {ours} is {b}; they must be alike")
    for path in sorted(paths_a):
      # The path below a single leaf is empty.
      ties[f"{theirs}/{path}" if path else theirs] = f"{ours}/{path}" if path else ours
  # An owner that is tied itself would make a reader look for a leaf that does not exist.
  for theirs, ours in ties.items():
    if ours in ties:
      raise StackError(f"tied: {theirs} is {ours}, which is {ties[ours]}; name that one for both")
  return ties


def below(name: str, paths: Mapping[str, str]) -> list[str]:
  """Leaf paths under one module, the module's name stripped."""
  return [path.removeprefix(f"{name}/") for path in paths if path.startswith(f"{name}/")]


def get_owned(trees: Mapping[str, Tree], path: str) -> Any:
  """The leaf at a path that begins with its module's name, out of one tree for each module."""
  name = next(name for name in trees if path.startswith(f"{name}/"))
  return get_path(trees[name], path.removeprefix(f"{name}/"))


def _find(trees: Mapping[str, Tree], path: str) -> Tree:
  """The leaf or subtree at a path that begins with a module's name; None where there is none."""
  for name, tree in trees.items():
    if path == name:
      return tree
    if path.startswith(f"{name}/"):
      return get_path(tree, path.removeprefix(f"{name}/"))
  known = f"{', '.join(list(trees)[:2])} ... {list(trees)[-1]}"
  raise StackError(f"tied: {path} begins with no module of the stack; there are {known}")
