"""Parameters that are another module's own: which they are, and how they are found by their paths.

A tied variable exists once, in the tree of its *owner*. Paths are `/`-joined and begin with the
name of a module, as `head/table` and `embed/table` do in `{"head/table": "embed/table"}`: the head
reads the embedding's table, and the head's own tree lacks it. A variable that is not trained can be
tied as well, of the head to the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module_spec import ModuleSpec, same_shapes
from jaxpipe.stack.paths import get_path, leaf_paths, merged

Tree = Any


def ties_of_leaves(
  specs: Mapping[str, ModuleSpec], tied: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
  """Ties between single leaves, out of ties between leaves or whole subtrees.

  Returns:
    Path of a leaf -> its owner's path, of parameters and of variables that are not trained.

  Raises:
    StackError: a path that is not there, leaves that differ, one of which is trained and the other
      not, an owner that is tied itself, or frozen leaves of others than head and embedding.
  """
  everything = {name: merged(spec.shapes, spec.state) for name, spec in specs.items()}
  shapes = {name: spec.shapes for name, spec in specs.items()}
  ties: dict[str, str] = {}
  frozen: dict[str, str] = {}
  for theirs, ours in tied.items():
    a, b = _find(everything, theirs), _find(everything, ours)
    paths_a, paths_b = ({*leaf_paths(tree)} if tree is not None else None for tree in (a, b))
    if paths_a is None or paths_a != paths_b or not same_shapes(a, b):
      raise StackError(f"tied: {theirs} is {a}, {ours} is {b}; they must be alike")
    for path in sorted(paths_a):
      # The path below a single leaf is empty.
      one, owner = f"{theirs}/{path}" if path else theirs, f"{ours}/{path}" if path else ours
      trained = [get_owned(shapes, at) is not None for at in (one, owner)]
      if trained[0] != trained[1]:
        raise StackError(
          f"tied: of {one} and {owner} trainable= trains one only; train both, or neither"
        )
      (ties if trained[0] else frozen)[one] = owner
  # An owner that is tied itself would make a reader look for a leaf that does not exist.
  for theirs, ours in [*ties.items(), *frozen.items()]:
    if ours in ties or ours in frozen:
      owner = {**ties, **frozen}[ours]
      raise StackError(f"tied: {theirs} is {ours}, which is {owner}; name that one for both")
  _check_frozen(specs, frozen)
  return ties, frozen


def _check_frozen(specs: Mapping[str, ModuleSpec], ties: Mapping[str, str]) -> None:
  """Refuses ties of what is not trained, but for constants of the head that the embedding owns.

  Raises:
    StackError: a tie between other modules, or of a statistic.
  """
  changing = {name: spec.changing for name, spec in specs.items()}
  for theirs, ours in ties.items():
    if get_owned(changing, theirs) or get_owned(changing, ours):
      raise StackError(
        f"tied: {theirs} is an nnx.BatchStat, which both modules would change; give each its own"
      )
    if not (theirs.startswith("head/") and ours.startswith("embed/")):
      raise StackError(
        f"tied: {theirs} is not trained; of such variables only the head's can be tied, to the"
        " embedding's. Leave the tie out, and give both modules the same values"
      )


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
