"""The variables of a stack, and where each lies in a tree of parameters that is placed on a mesh.

A placed array holds one variable of all layers (stacked), one variable (of an end), or many
variables of one stage in each of its rows (packed). Here all three are written alike: the name of
the array, the row in it and, of packed rows, the element at which the variable begins.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.mesh import FSDP
from jaxpipe.parallel.placing import layer_order, param_specs
from jaxpipe.parallel.rules import describe
from jaxpipe.schedules import Schedule
from jaxpipe.stack.protocol import PackedStack, is_packed
from jaxpipe.stack.stack import LayerStack

Tree = Any
# One leaf's place in nested dicts: the keys that lead to it.
Keys = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Variable:
  """One variable of the model.

  Attributes:
    path: as messages name it, such as `layers/3/inner/kernel`.
    keys: those that lead to it in the tree with one leaf per variable.
    shape, dtype: its own.
    array: name of the placed array that holds it, such as `layers/inner/kernel` or
      `layers/float32`.
    row: its row in that array, in placement order; None where the array is the variable.
    everywhere: whether each device along `stage` holds that row, as of what layers share, and as
      of an array that is the variable.
    offset: element of the row at which it begins, of packed rows; None where the row is the
      variable.
  """

  path: str
  keys: Keys
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  array: str
  row: int | None
  everywhere: bool
  offset: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Variables:
  """All variables of a stack, as they lie on a mesh by a schedule.

  Attributes:
    each: the variables, in the order of the leaves of `tree`.
    tree: the tree with one leaf per variable, of `jax.ShapeDtypeStruct`s:
      `{"embed": ..., "head": ..., "layers": {"0": ..., "1": ...}}`.
    arrays: name -> shape and dtype of each array of the placed tree.
    specs: name -> its partition spec, with an entry for every dim.
    structure: of the placed tree, whose leaves are `arrays` in order.
    devices: devices along `stage`, P.
    rows: number of rows that each of these devices holds of a stacked or packed array.
    mesh: the mesh.
  """

  each: tuple[Variable, ...]
  tree: Tree
  arrays: Mapping[str, jax.ShapeDtypeStruct]
  specs: Mapping[str, Spec]
  structure: Any
  devices: int
  rows: int
  mesh: Mesh

  @classmethod
  def of(cls, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Variables:
    """Lists the variables of a stack.

    Args:
      stack: the user's stack.
      schedule: says which device holds which stages.
      mesh: with an axis `stage` of the schedule's devices.
    """
    laid = stack.laid_out(schedule)
    shapes = laid.param_shapes()
    specs = param_specs(shapes, laid, schedule, mesh)
    tree = _tree(stack.network.param_shapes(), stack.depth)
    row_of = np.argsort(layer_order(laid.depth, schedule))
    if is_packed(laid):
      homes = _packed_homes(laid, row_of)
    else:
      homes = _stacked_homes(tree, row_of, laid.shared_rows)
    each = []
    for path, leaf in jax.tree.leaves_with_path(tree):
      name = describe(path)
      array, row, offset = homes[name]
      keys = tuple(key.key for key in path)
      everywhere = row is None or array in laid.shared_rows
      of_leaf = (tuple(leaf.shape), leaf.dtype)
      each.append(Variable(name, keys, *of_leaf, array, row, everywhere, offset))
    arrays, structure = jax.tree.flatten_with_path(shapes)
    names = [describe(path) for path, _ in arrays]
    return cls(
      each=tuple(each),
      tree=tree,
      arrays=dict(zip(names, [leaf for _, leaf in arrays], strict=True)),
      specs=dict(zip(names, jax.tree.leaves(specs), strict=True)),
      structure=structure,
      devices=schedule.devices,
      rows=laid.depth // schedule.devices,
      mesh=mesh,
    )

  @functools.cached_property
  def number(self) -> dict[Keys, int]:
    """Keys of a variable -> its number in `each`."""
    return {variable.keys: i for i, variable in enumerate(self.each)}

  def spec(self, variable: Variable) -> Spec:
    """Partition spec of the variable's own dims; of a packed one, of the row's only dim."""
    spec = self.specs[variable.array]
    return spec if variable.row is None else Spec(*spec[1:])

  def own_spec(self, shape: tuple[int, ...], rows: Sequence[str | None] = ()) -> Spec:
    """Partition spec of an array that is no variable's.

    Args:
      shape: of the array, or of one row of it.
      rows: the spec's entry for the rows, of an array that has some.
    """
    n = dict(self.mesh.shape).get(FSDP, 1)
    fits = [dim for dim in range(len(shape)) if n > 1 and shape[dim] % n == 0]
    best = max(fits, key=lambda dim: shape[dim], default=None)
    entries = [FSDP if dim == best else None for dim in range(len(shape))]
    return Spec(*rows, *entries)

  def named(self, placed: Tree) -> dict[str, Any]:
    """Name -> array of a placed tree of the parameters' structure."""
    leaves, structure = jax.tree.flatten(placed)
    if structure != self.structure:
      raise ValueError(
        f"a tree of {structure} was given where one of placed parameters belongs, which is"
        f" {self.structure}; place it first: jaxpipe.place or pipe.place"
      )
    for leaf, (name, want) in zip(leaves, self.arrays.items(), strict=True):
      if np.shape(leaf) != want.shape:
        raise ValueError(
          f"placed array {name} has shape {list(np.shape(leaf))}, and the stack's has"
          f" {list(want.shape)}; place the tree by the same stack and schedule"
        )
    return dict(zip(self.arrays, leaves, strict=True))


def by_leaf(stack: LayerStack, canonical: Tree) -> Tree:
  """A canonical tree of the structure of parameters as one with one leaf per variable."""
  return _tree(stack.network.split(canonical), stack.depth)


def _tree(modules: Mapping[str, Tree], depth: int) -> Tree:
  """The tree with one leaf per variable, of the trees of all modules."""
  layers = {str(i): modules[f"layers/{i}"] for i in range(depth)}
  return {"embed": modules["embed"], "head": modules["head"], "layers": layers}


def _stacked_homes(
  tree: Tree, row_of: np.ndarray, shared: Mapping[str, Sequence[int]]
) -> dict[str, tuple[str, int | None, int | None]]:
  """Path of each variable of a uniform stack -> name of its array, row and offset."""
  homes: dict[str, tuple[str, int | None, int | None]] = {}
  for path, _ in jax.tree.leaves_with_path(tree):
    name = describe(path)
    if name.startswith("layers/"):
      layer, _, rest = name.removeprefix("layers/").partition("/")
      array = f"layers/{rest}" if rest else "layers"
      homes[name] = (array, int(shared.get(array, row_of)[int(layer)]), None)
    else:
      homes[name] = (name, None, None)
  return homes


def _packed_homes(
  laid: PackedStack, row_of: np.ndarray
) -> dict[str, tuple[str, int | None, int | None]]:
  """Path of each variable of a packed stack -> name of its array, row and offset."""
  homes: dict[str, tuple[str, int | None, int | None]] = {}
  for s, flat in enumerate(laid.params):
    # A row knows its leaves by their numbers in the flattened dict of the stage's modules.
    numbered = jax.tree.unflatten(flat.structure, range(len(flat.leaves)))
    for path, n in jax.tree.leaves_with_path(numbered):
      array = f"layers/{flat.leaves[n].dtype}"
      homes[describe(path)] = (array, int(row_of[s]), flat.offsets[n])
  return homes
