"""The modules of a stack, in order, and how the canonical tree is made of theirs.

A *piece* is a module of the network by its place: `embed`, `layers/0` ... `layers/L-1`, `head`. In
the canonical tree consecutive layers of one kind, a *run*, are stacked along a leading layer dim:

    {"embed": ..., "layers": run, "head": ...}             one run
    {"embed": ..., "layers": (run, run, ...), "head": ...}  several

The tree of the state is made alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.models.context import Context, LayerInputs
from jaxpipe.models.part import Factory, Part, StackError, called, same_shapes, sums
from jaxpipe.models.paths import get_path, leaf_paths, set_path, without

Tree = Any


@dataclasses.dataclass(frozen=True)
class Pieces:
  """All modules of a stack.

  Attributes:
    parts: piece -> its module as data, first to last.
    ties: path of a leaf that is another piece's own -> the owner's path; both begin with the piece.
    runs: layers that are stacked, in order.
  """

  parts: Mapping[str, Part]
  ties: Mapping[str, str]
  runs: tuple[range, ...]

  @classmethod
  def trace(
    cls,
    embed: Factory,
    layers: Sequence[Factory],
    head: Factory,
    tied: Mapping[str, str],
    trainable: Any,
  ) -> Pieces:
    """Traces the modules, each factory once."""
    traced: dict[int, Part] = {}
    parts = {"embed": Part.trace("embed", embed, trainable)}
    for i, factory in enumerate(layers):
      if id(factory) not in traced:
        traced[id(factory)] = Part.trace(f"layers[{i}]", factory, trainable)
      parts[f"layers/{i}"] = dataclasses.replace(traced[id(factory)], name=f"layers[{i}]")
    parts["head"] = Part.trace("head", head, trainable)
    ties = _leaf_ties(parts, tied)
    return cls(parts, ties, _runs(parts, ties))

  @property
  def depth(self) -> int:
    """Number of layers."""
    return len(self.parts) - 2

  def own(self, piece: str, params: Tree) -> Tree:
    """A piece's parameters without those that are another's."""
    return without(params, self._tied_in(piece))

  def _tied_in(self, piece: str) -> list[str]:
    return _below(piece, self.ties)

  def owners(self, piece: str) -> dict[str, str]:
    """For each leaf of a piece that is another's, its path in the piece -> the owner's path."""
    return {path: self.ties[f"{piece}/{path}"] for path in self._tied_in(piece)}

  def param_shapes(self) -> dict[str, Tree]:
    """Piece -> shapes of the parameters that are its own."""
    return {piece: self.own(piece, part.shapes) for piece, part in self.parts.items()}

  def state_shapes(self) -> dict[str, Tree]:
    """Piece -> shapes of its state."""
    return {piece: part.state for piece, part in self.parts.items()}

  def join(self, trees: Mapping[str, Tree]) -> Tree:
    """The canonical tree of pieces' trees, of arrays or of shapes."""
    runs = tuple(_stacked([trees[f"layers/{i}"] for i in run]) for run in self.runs)
    layers = runs[0] if len(runs) == 1 else runs
    return {"embed": trees["embed"], "layers": layers, "head": trees["head"]}

  def cut(self, tree: Tree) -> dict[str, Tree]:
    """Inverse of `join`."""
    runs = [tree["layers"]] if len(self.runs) == 1 else tree["layers"]
    out = {"embed": tree["embed"]}
    for run, stacked in zip(self.runs, runs, strict=True):
      for i in run:
        out[f"layers/{i}"] = jax.tree.map(lambda leaf, j=i - run.start: leaf[j], stacked)
    return {**out, "head": tree["head"]}

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Fresh parameters and state, canonical."""
    made = {piece: self.init_piece(piece, key) for piece in self.parts}
    return (
      self.join({piece: params for piece, (params, _) in made.items()}),
      self.join({piece: state for piece, (_, state) in made.items()}),
    )

  def init_piece(self, piece: str, key: jax.Array) -> tuple[Tree, Tree]:
    """Fresh parameters of its own, and fresh state."""
    params, state = self.parts[piece].init(jax.random.fold_in(key, self._number(piece)))
    return self.own(piece, params), state

  def _number(self, piece: str) -> int:
    ends = {"embed": 0, "head": 1}
    return ends[piece] if piece in ends else 2 + layer_number(piece)

  def params_of(self, piece: str, trees: Mapping[str, Tree]) -> Tree:
    """A piece's parameters, those of others included, from all pieces' own."""
    params = trees[piece]
    for path, owner in self.owners(piece).items():
      params = set_path(params, path, get_owned(trees, owner))
    return params

  def call(
    self, piece: str, params: Tree, state: Tree, x: Tree, training: bool, inputs: LayerInputs
  ) -> tuple[Tree, Tree]:
    """Calls a module of whatever place.

    Args:
      piece: which.
      params: all of its parameters.
      state: its state.
      x: what the piece before returned; for the embedding nothing is read of it.
      training: see `Context`.
      inputs: of the microbatch; its `layer` is not read.

    Returns:
      What the module returns, of the head `(loss_sum, (weight, metrics))`; and its state after the
      call.
    """
    part = self.parts[piece]
    if piece == "embed":
      return part.run(params, state, training, inputs["batch"])
    if piece == "head":
      out, after = part.run(params, state, training, x, inputs["batch"])
      return sums(out), after
    inputs = {**inputs, "layer": layer_number(piece)}
    return part.run(params, state, training, x, Context.create(training, **inputs))

  def try_piece(self, piece: str, *args: Tree) -> Tree:
    """Shapes of what an end returns.

    Raises:
      StackError: it raises an error of shapes or types; names the piece.
    """
    part = self.parts[piece]

    def call(params: Tree, state: Tree, *args: Tree) -> Tree:
      out = part.run(params, state, True, *args)[0]
      return sums(out) if piece == "head" else out

    with called(part.name, args[0]):
      return jax.eval_shape(call, part.shapes, part.state, *args)

  def try_layer(self, i: int, x: Tree, batch: Tree) -> Tree:
    """The same of a layer."""
    return shape_after(self.parts[f"layers/{i}"], x, batch)


def shape_after(part: Part, x: Tree, batch: Tree) -> Tree:
  """Shapes of what a layer returns for x.

  Raises:
    StackError: it raises an error of shapes or types; names the layer and what it was given.
  """
  rows = _rows(batch)

  def call(params: Tree, state: Tree, x: Tree, batch: Tree) -> Tree:
    key, number = jax.random.key(0), jnp.int32(0)
    inputs = LayerInputs(
      batch=batch, key=key, layer=number, microbatch=number, rows=jnp.arange(rows)
    )
    return part.run(params, state, True, x, Context.create(True, **inputs))[0]

  with called(f"{part.name} ({part.label})", x):
    return jax.eval_shape(call, part.shapes, part.state, x, batch)


def get_owned(trees: Mapping[str, Tree], path: str) -> Any:
  """The leaf at a path that begins with its piece."""
  piece = next(piece for piece in trees if path.startswith(f"{piece}/"))
  return get_path(trees[piece], path.removeprefix(f"{piece}/"))


def layer_number(piece: str) -> int:
  """Of `layers/3`, 3."""
  return int(piece.partition("/")[2])


def _below(piece: str, paths: Mapping[str, str]) -> list[str]:
  """What follows the piece in those of the paths that begin with it."""
  return [path.removeprefix(f"{piece}/") for path in paths if path.startswith(f"{piece}/")]


def _leaf_ties(parts: Mapping[str, Part], tied: Mapping[str, str]) -> dict[str, str]:
  """Ties of single leaves.

  Raises:
    StackError: a path that is not there, leaves that differ, or an owner that is tied itself.
  """
  shapes = {piece: part.shapes for piece, part in parts.items()}
  states = {piece: part.state for piece, part in parts.items()}
  ties: dict[str, str] = {}
  for theirs, ours in tied.items():
    a, b = _find(shapes, theirs), _find(shapes, ours)
    if a is None and b is None and _find(states, theirs) is not None:
      raise StackError(f"tied: {theirs} is not trained, and only what is trained can be tied")
    names_a, names_b = ({*leaf_paths(tree)} if tree is not None else None for tree in (a, b))
    if names_a is None or names_a != names_b or not same_shapes(a, b):
      raise StackError(f"tied: {theirs} is {a}, {ours} is {b}; they must be alike")
    for name in sorted(names_a):
      ties[f"{theirs}/{name}" if name else theirs] = f"{ours}/{name}" if name else ours
  for theirs, ours in ties.items():
    if ours in ties:
      raise StackError(f"tied: {theirs} is {ours}, which is {ties[ours]}; name that one for both")
  return ties


def _find(shapes: Mapping[str, Tree], path: str) -> Tree:
  """The leaf or tree at a path that begins with its piece; None where there is none."""
  for piece, tree in shapes.items():
    if path == piece:
      return tree
    if path.startswith(f"{piece}/"):
      return get_path(tree, path.removeprefix(f"{piece}/"))
  known = f"{', '.join(list(shapes)[:2])} ... {list(shapes)[-1]}"
  raise StackError(f"tied: {path} begins with no module of the stack; there are {known}")


def _runs(parts: Mapping[str, Part], ties: Mapping[str, str]) -> tuple[range, ...]:
  starts = [0]
  depth = len(parts) - 2
  for i in range(1, depth):
    one, before = parts[f"layers/{i}"], parts[f"layers/{i - 1}"]
    alike = one.graph is before.graph or one.same_kind(before)
    if not alike or _below(f"layers/{i}", ties) != _below(f"layers/{i - 1}", ties):
      starts.append(i)
  return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], depth], strict=True))


def _stacked(trees: Sequence[Tree]) -> Tree:
  def stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)

  return jax.tree.map(stack, *trees)


def _rows(batch: Tree) -> int:
  """Rows of a batch; x may have leaves without rows, such as a loss that layers add to."""
  for path, leaf in jax.tree.leaves_with_path(batch):
    if not jnp.shape(leaf):
      raise StackError(f"batch{jax.tree_util.keystr(path)} is a scalar; every leaf is [B, ...]")
    return int(jnp.shape(leaf)[0])
  raise StackError("the batch has no leaves; every leaf is [B, ...]")
