"""Leaves that layers of one kind share, stacked with a row for each layer that owns one.

Layers that are repeated, as in ALBERT or a looped transformer, read the same variables. They are
still one loop: each turn reads the rows of its layer, and a leaf has as many rows as owners. Of six
layers, whose kernel is tied to that of the layer two before:

    layer       0 1 2 3 4 5
    kernel      0 1 0 1 0 1     rows of a leaf [2, ...], which every stage holds whole
    bias        0 1 2 3 4 5     rows of a leaf [6, ...], dealt out to the stages
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.stack.paths import get_path, set_path, without

Tree = Any
_LAYER = re.compile(r"layers/(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class SharedRows:
  """Which layer owns what the layers of a run share.

  Attributes:
    owners: path of a leaf below its layer -> for each layer the number of the layer whose variable
      it reads, [L].
  """

  owners: Mapping[str, tuple[int, ...]]

  @classmethod
  def of(cls, ties: Mapping[str, str], depth: int) -> SharedRows:
    """Finds the leaves that a loop over all layers can read by rows.

    Args:
      ties: path of a tied leaf -> its owner's path, both beginning with the name of a module.
      depth: number of layers, L.

    Returns:
      None of them where a loop would not do: a layer shares with an end or under another path, or
      more than half of the layers own the leaf, all of whose rows every device would hold.
    """
    owners: dict[str, list[int]] = {}
    for theirs, ours in ties.items():
      if theirs.startswith("head/") and ours.startswith("embed/"):
        continue
      reads, owns = _LAYER.fullmatch(theirs), _LAYER.fullmatch(ours)
      if not (reads and owns and reads[2] == owns[2]):
        return NOTHING_SHARED
      owners.setdefault(reads[2], list(range(depth)))[int(reads[1])] = int(owns[1])
    if any(2 * len(set(each)) > depth for each in owners.values()):
      return NOTHING_SHARED
    return cls({path: tuple(each) for path, each in owners.items()})

  def rows(self) -> dict[str, tuple[int, ...]]:
    """Path of a leaf -> the row of the stacked leaf that each layer reads, [L]."""
    found = {}
    for path, owners in self.owners.items():
      row = {layer: n for n, layer in enumerate(sorted(set(owners)))}
      found[path] = tuple(row[layer] for layer in owners)
    return found

  def stack(self, layers: Sequence[Tree]) -> Tree:
    """The stacked tree of a run of layers, each given as the tree of what it owns.

    Args:
      layers: of arrays or of shapes, parameters or model state, first to last.
    """
    alone = [without(tree, self._in(tree)) for tree in layers]
    stacked = _stacked(alone)
    for path in self.owners:
      found = [leaf for tree in layers if (leaf := get_path(tree, path)) is not None]
      if found:  # model state has nothing that is shared
        stacked = set_path(stacked, path, _stacked(found))
    return stacked

  def layer(self, stacked: Tree, i: int) -> Tree:
    """The tree of what layer i owns, out of the stacked tree; the inverse of `stack`."""
    shared = self._in(stacked)
    own = jax.tree.map(lambda leaf: leaf[i], without(stacked, shared))
    for path in shared:
      owners = self.owners[path]
      if owners[i] == i:
        own = set_path(own, path, get_path(stacked, path)[sorted(set(owners)).index(i)])
    return own

  def repeated(self, stacked: Tree) -> Tree:
    """The stacked tree with a row for every layer, leaves [L, ...]."""
    rows = self.rows()
    for path in self._in(stacked):
      stacked = set_path(stacked, path, get_path(stacked, path)[np.array(rows[path])])
    return stacked

  def _in(self, tree: Tree) -> list[str]:
    """Paths of the shared leaves that a tree has."""
    return [path for path in self.owners if get_path(tree, path) is not None]


NOTHING_SHARED = SharedRows({})


def _stacked(trees: Sequence[Tree]) -> Tree:
  """Trees of arrays or of shapes, their leaves stacked along a new leading dim."""

  def stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)

  return jax.tree.map(stack, *trees)
