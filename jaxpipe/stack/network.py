"""The modules of a stack, in order, and how the canonical tree is made of theirs.

A module is named by its place: `embed`, `layers/0` ... `layers/L-1`, `head`. In the canonical tree
consecutive layers of one kind, a *run*, are stacked along a leading layer dim:

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

from jaxpipe.stack.context import Context, LayerInputs
from jaxpipe.stack.module_spec import Factory, ModuleSpec, StackError, called, same_shapes, sums
from jaxpipe.stack.paths import get_path, leaf_paths, set_path, without

Tree = Any


@dataclasses.dataclass(frozen=True)
class Network:
  """All modules of a stack.

  Attributes:
    specs: module -> its module as data, first to last.
    ties: path of a leaf that is another module's own -> the owner's path; both begin with the name
      of the module.
    runs: layers that are stacked, in order.
  """

  specs: Mapping[str, ModuleSpec]
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
  ) -> Network:
    """Traces the modules, each factory once."""
    traced: dict[int, ModuleSpec] = {}
    specs = {"embed": ModuleSpec.trace("embed", embed, trainable)}
    for i, factory in enumerate(layers):
      if id(factory) not in traced:
        traced[id(factory)] = ModuleSpec.trace(f"layers[{i}]", factory, trainable)
      specs[f"layers/{i}"] = dataclasses.replace(traced[id(factory)], name=f"layers[{i}]")
    specs["head"] = ModuleSpec.trace("head", head, trainable)
    ties = _leaf_ties(specs, tied)
    return cls(specs, ties, _runs(specs, ties))

  @property
  def depth(self) -> int:
    """Number of layers."""
    return len(self.specs) - 2

  def own(self, module: str, params: Tree) -> Tree:
    """A module's parameters without those that are another's."""
    return without(params, self._tied_in(module))

  def _tied_in(self, module: str) -> list[str]:
    return _below(module, self.ties)

  def owners(self, module: str) -> dict[str, str]:
    """For each leaf of a module that is another's, its path in the module -> the owner's path."""
    return {path: self.ties[f"{module}/{path}"] for path in self._tied_in(module)}

  def param_shapes(self) -> dict[str, Tree]:
    """Piece -> shapes of the parameters that are its own."""
    return {module: self.own(module, spec.shapes) for module, spec in self.specs.items()}

  def state_shapes(self) -> dict[str, Tree]:
    """Piece -> shapes of its state."""
    return {module: spec.state for module, spec in self.specs.items()}

  def join(self, trees: Mapping[str, Tree]) -> Tree:
    """The canonical tree of all modules' trees, of arrays or of shapes."""
    runs = tuple(_stacked([trees[f"layers/{i}"] for i in run]) for run in self.runs)
    layers = runs[0] if len(runs) == 1 else runs
    return {"embed": trees["embed"], "layers": layers, "head": trees["head"]}

  def split(self, tree: Tree) -> dict[str, Tree]:
    """Inverse of `join`."""
    runs = [tree["layers"]] if len(self.runs) == 1 else tree["layers"]
    out = {"embed": tree["embed"]}
    for run, stacked in zip(self.runs, runs, strict=True):
      for i in run:
        out[f"layers/{i}"] = jax.tree.map(lambda leaf, j=i - run.start: leaf[j], stacked)
    return {**out, "head": tree["head"]}

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Fresh parameters and state, canonical."""
    made = {module: self.init_module(module, key) for module in self.specs}
    return (
      self.join({module: params for module, (params, _) in made.items()}),
      self.join({module: state for module, (_, state) in made.items()}),
    )

  def init_module(self, module: str, key: jax.Array) -> tuple[Tree, Tree]:
    """Fresh parameters of its own, and fresh state."""
    params, state = self.specs[module].init(jax.random.fold_in(key, self._number(module)))
    return self.own(module, params), state

  def _number(self, module: str) -> int:
    ends = {"embed": 0, "head": 1}
    return ends[module] if module in ends else 2 + layer_number(module)

  def params_of(self, module: str, trees: Mapping[str, Tree]) -> Tree:
    """A module's parameters, those of others included, from what each module owns."""
    params = trees[module]
    for path, owner in self.owners(module).items():
      params = set_path(params, path, get_owned(trees, owner))
    return params

  def call(
    self, module: str, params: Tree, state: Tree, x: Tree, training: bool, inputs: LayerInputs
  ) -> tuple[Tree, Tree]:
    """Calls a module of whatever place.

    Args:
      module: which.
      params: all of its parameters.
      state: its state.
      x: what the module before returned; for the embedding nothing is read of it.
      training: see `Context`.
      inputs: of the microbatch; its `layer` is not read.

    Returns:
      What the module returns, of the head `(loss_sum, (weight, metrics))`; and its state after the
      call.
    """
    spec = self.specs[module]
    if module == "embed":
      return spec.run(params, state, training, inputs["batch"])
    if module == "head":
      out, after = spec.run(params, state, training, x, inputs["batch"])
      return sums(out), after
    inputs = {**inputs, "layer": layer_number(module)}
    return spec.run(params, state, training, x, Context.create(training, **inputs))

  def try_end(self, module: str, *args: Tree) -> Tree:
    """Shapes of what an end returns.

    Raises:
      StackError: it raises an error of shapes or types; names the module.
    """
    spec = self.specs[module]

    def call(params: Tree, state: Tree, *args: Tree) -> Tree:
      out = spec.run(params, state, True, *args)[0]
      return sums(out) if module == "head" else out

    with called(spec.name, args[0]):
      return jax.eval_shape(call, spec.shapes, spec.state, *args)

  def try_layer(self, i: int, x: Tree, batch: Tree) -> Tree:
    """The same of a layer."""
    return shape_after(self.specs[f"layers/{i}"], x, batch)


def shape_after(spec: ModuleSpec, x: Tree, batch: Tree) -> Tree:
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
    return spec.run(params, state, True, x, Context.create(True, **inputs))[0]

  with called(f"{spec.name} ({spec.label})", x):
    return jax.eval_shape(call, spec.shapes, spec.state, x, batch)


def get_owned(trees: Mapping[str, Tree], path: str) -> Any:
  """The leaf at a path that begins with its module."""
  module = next(module for module in trees if path.startswith(f"{module}/"))
  return get_path(trees[module], path.removeprefix(f"{module}/"))


def layer_number(module: str) -> int:
  """Of `layers/3`, 3."""
  return int(module.partition("/")[2])


def _below(module: str, paths: Mapping[str, str]) -> list[str]:
  """What follows the module in those of the paths that begin with it."""
  return [path.removeprefix(f"{module}/") for path in paths if path.startswith(f"{module}/")]


def _leaf_ties(specs: Mapping[str, ModuleSpec], tied: Mapping[str, str]) -> dict[str, str]:
  """Ties of single leaves.

  Raises:
    StackError: a path that is not there, leaves that differ, or an owner that is tied itself.
  """
  shapes = {module: spec.shapes for module, spec in specs.items()}
  states = {module: spec.state for module, spec in specs.items()}
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
  """The leaf or tree at a path that begins with its module; None where there is none."""
  for module, tree in shapes.items():
    if path == module:
      return tree
    if path.startswith(f"{module}/"):
      return get_path(tree, path.removeprefix(f"{module}/"))
  known = f"{', '.join(list(shapes)[:2])} ... {list(shapes)[-1]}"
  raise StackError(f"tied: {path} begins with no module of the stack; there are {known}")


def _runs(specs: Mapping[str, ModuleSpec], ties: Mapping[str, str]) -> tuple[range, ...]:
  starts = [0]
  depth = len(specs) - 2
  for i in range(1, depth):
    one, before = specs[f"layers/{i}"], specs[f"layers/{i - 1}"]
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
