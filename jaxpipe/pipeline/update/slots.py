"""What a transformation keeps for each variable, as arrays that lie on the mesh like parameters.

The state of an optax transformation is any tree. Parts of it repeat the tree of parameters: for
each variable they have nothing, one array (a moment) or several (the factors of one). Each such
part, a dict of exactly `embed`, `head` and `layers`, becomes a node `Slots`; all else, such as a
counter, stays as it is and lies whole on every device.

A slot of the variable's own shape lies where the variable lies. One of another shape has an array
of its own, stacked over layers, or a stretch of another packed row:

    canonical    mu: {"embed": ..., "head": ..., "layers": {"0": {"kernel": m}, "1": {...}}}
    placed       mu: Slots({"layers.kernel.0": [L, ...], "embed.table.0": ...})
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.flat import Flat, read_span, widest
from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.update.variables import Variables

Tree = Any
_PARTS = {"embed", "layers", "head"}
# From this share of a packed array's elements on, slots lie in rows as wide as the array's.
_WIDE = 0.9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """A part of an optimizer's state that repeats the tree of parameters, placed.

  Attributes:
    arrays: name -> placed array.
    structure: of the canonical part, with one node per variable.
    leaves: shape and name of the dtype of each leaf of the canonical part, in order.
  """

  arrays: dict[str, Any]
  structure: Any = dataclasses.field(metadata={"static": True})
  leaves: tuple[tuple[tuple[int, ...], str], ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where one leaf of a canonical part lies.

  Attributes:
    variable: number of the variable that it belongs to.
    shape: its own.
    array: name of the array in `Slots.arrays`.
    like: whether it lies as the variable does, whose shape it then has.
    offset: element of the row at which it begins, of packed rows; None elsewhere.
  """

  variable: int
  shape: tuple[int, ...]
  array: str
  like: bool
  offset: int | None


@dataclasses.dataclass(frozen=True)
class SlotsLayout:
  """How a part of a state lies on the mesh.

  Attributes:
    slots: one for each leaf of the canonical part, in order.
    arrays: name -> shape and dtype.
    specs: name -> partition spec.
  """

  slots: tuple[Slot, ...]
  arrays: Mapping[str, jax.ShapeDtypeStruct]
  specs: Mapping[str, Spec]


@dataclasses.dataclass(frozen=True, eq=False)
class StateLayouts:
  """Layouts of the parts of optimizer states over one stack, schedule and mesh.

  Attributes:
    variables: of the stack.
  """

  variables: Variables

  def of(self, slots: Slots) -> SlotsLayout:
    """The layout of a part of a state."""
    return self._layout(slots.structure, slots.leaves)

  def shapes(self, part: Tree) -> Slots:
    """The placed shapes of a canonical part, which may be of arrays or of shapes."""
    leaves, structure = jax.tree.flatten(part)
    described = tuple((tuple(np.shape(leaf)), str(_dtype(leaf))) for leaf in leaves)
    return Slots(dict(self._layout(structure, described).arrays), structure, described)

  @functools.cache  # noqa: B019 - lives as long as the object, as the programs that it is for
  def _layout(self, structure: Any, leaves: tuple[tuple[tuple[int, ...], str], ...]) -> SlotsLayout:
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    owners = {n: self._owner(path) for path, n in jax.tree.leaves_with_path(numbered)}
    slots: list[Slot | None] = [None] * len(leaves)
    arrays: dict[str, jax.ShapeDtypeStruct] = {}
    specs: dict[str, Spec] = {}
    counts: dict[tuple[int, str], int] = {}
    wide = self._in_wide_rows(owners, leaves)
    # Slots of other shapes in packed rows: row -> number of the leaf -> shape.
    loose: dict[int, dict[int, jax.ShapeDtypeStruct]] = {}
    for n, (shape, dtype) in enumerate(leaves):
      v = owners[n]
      variable = self.variables.each[v]
      like = shape == variable.shape and (variable.offset is None or v in wide)
      if variable.offset is not None and not like:
        assert variable.row is not None
        loose.setdefault(variable.row, {})[n] = jax.ShapeDtypeStruct(shape, dtype)
        continue
      stem = variable.array.replace("/", ".")
      kind = dtype if like else f"{dtype}_{'x'.join(map(str, shape))}"
      count = counts[v, kind] = counts.get((v, kind), -1) + 1
      name = f"{stem}.{kind}.{count}"
      slots[n] = Slot(v, shape, name, like, variable.offset)
      base = self.variables.arrays[variable.array]
      rows = () if variable.row is None else base.shape[:1]
      lies = () if variable.row is None else (None if variable.everywhere else STAGE,)
      arrays[name] = jax.ShapeDtypeStruct(base.shape if like else (*rows, *shape), dtype)
      own = self.variables.own_spec(shape, lies)
      specs[name] = self.variables.specs[variable.array] if like else own
    flats = {row: Flat.of(tree) for row, tree in loose.items()}
    depth = self.variables.rows * self.variables.devices
    for dtype, width in widest(flats.values()).items():
      arrays[f"rest.{dtype}"] = jax.ShapeDtypeStruct((depth, width), dtype)
      specs[f"rest.{dtype}"] = self.variables.own_spec((width,), (STAGE,))
    for row, tree in loose.items():
      for i, n in enumerate(tree):
        shape, dtype = leaves[n]
        slots[n] = Slot(owners[n], shape, f"rest.{dtype}", False, flats[row].offsets[i])
    return SlotsLayout(tuple(slot for slot in slots if slot), arrays, specs)

  def _in_wide_rows(
    self, owners: Mapping[int, int], leaves: Sequence[tuple[tuple[int, ...], str]]
  ) -> set[int]:
    """Packed variables whose slots of their own shape lie in rows as wide as the parameters'.

    Where few have one, as of a transformation for biases alone, such rows would be mostly empty.
    """
    each = self.variables.each
    have = {v for n, v in owners.items() if leaves[n][0] == each[v].shape}
    size: dict[str, int] = {}
    used: dict[str, int] = {}
    for v, variable in enumerate(each):
      n = math.prod(variable.shape)
      size[variable.array] = size.get(variable.array, 0) + n
      used[variable.array] = used.get(variable.array, 0) + n * (v in have)
    return {v for v in have if used[each[v].array] >= _WIDE * size[each[v].array]}

  def _owner(self, path: Any) -> int:
    """Number of the variable whose keys a path in a canonical part begins with."""
    keys = tuple(getattr(key, "key", None) for key in path)
    for end in range(len(keys), 0, -1):
      if keys[:end] in self.variables.number:
        return self.variables.number[keys[:end]]
    raise ValueError(
      f"optimizer state at {jax.tree_util.keystr(path)} belongs to no variable of this stack"
    )

  # Whole states

  def placed_shapes(self, state: Tree) -> Tree:
    """Shapes of a placed state, for the canonical one."""
    return map_parts(self.shapes, state, _shape)

  def specs(self, state: Tree) -> Tree:
    """A partition spec for each array of a placed state."""

    def of_part(part: Slots) -> Slots:
      return dataclasses.replace(part, arrays=dict(self.of(part).specs))

    return map_slots(of_part, state, lambda _: Spec())

  def place(self, state: Tree, other: Callable[[Tree], Tree]) -> Tree:
    """A state, laid out over the mesh.

    Args:
      state: what a transformation has made of one leaf per variable, or of a canonical tree.
      other: places a canonical tree of the parameters' structure.
    """
    mesh = self.variables.mesh

    def of_part(part: Tree) -> Tree:
      if not self.is_by_leaf(part):
        return other(part)
      slots = self._joined(part)
      specs = self.of(slots).specs
      places = {name: NamedSharding(mesh, specs[name]) for name in slots.arrays}
      return dataclasses.replace(slots, arrays=jax.device_put(slots.arrays, places))

    everywhere = NamedSharding(mesh, Spec())
    return map_parts(of_part, state, lambda leaf: jax.device_put(leaf, everywhere))

  def unplace(self, state: Tree, other: Callable[[Tree], Tree]) -> Tree:
    """The state of a placed one: of a part made by variable, one leaf per variable.

    Args:
      state: placed.
      other: the canonical tree of one that was placed.
    """

    def one(node: Any) -> Any:
      if is_slots(node):
        return self._divide(node)
      return other(node) if is_part(node) else node

    return jax.tree.map(one, state, is_leaf=lambda node: is_slots(node) or is_part(node))

  def is_by_leaf(self, part: Tree) -> bool:
    """Whether a part of a state has one node per variable, and not layers that are stacked."""
    names = self.variables.tree["layers"].keys()
    return isinstance(part["layers"], dict) and part["layers"].keys() == names

  # All leaves by one program, which is compiled once for each structure.
  @functools.cached_property
  def _divide(self) -> Callable[[Slots], Tree]:
    return jax.jit(self._divided)

  def _joined(self, part: Tree) -> Slots:
    """A canonical part as placed arrays, not yet sharded."""
    slots = self.shapes(part)
    layout = self.of(slots)
    arrays = {name: np.zeros(a.shape, a.dtype) for name, a in slots.arrays.items()}
    for leaf, slot in zip(jax.tree.leaves(part), layout.slots, strict=True):
      row = self.variables.each[slot.variable].row
      value = np.asarray(leaf)
      if row is None:
        arrays[slot.array] = value
      elif slot.offset is None:
        arrays[slot.array][row] = value
      else:
        arrays[slot.array][row, slot.offset : slot.offset + value.size] = value.reshape(-1)
    return dataclasses.replace(slots, arrays=arrays)

  def _divided(self, slots: Slots) -> Tree:
    """The canonical part of placed arrays."""
    leaves = []
    for slot in self.of(slots).slots:
      array, row = slots.arrays[slot.array], self.variables.each[slot.variable].row
      if row is not None and slot.offset is None:
        array = array[row]
      elif row is not None:
        array = read_span(array, slot.shape, slot.offset, row)
      leaves.append(array)
    return jax.tree.unflatten(slots.structure, leaves)


def is_part(node: Any) -> bool:
  """Whether a node of a state repeats the tree of parameters."""
  return isinstance(node, dict) and node.keys() == _PARTS


def map_parts(fn: Callable[[Tree], Any], tree: Tree, other: Callable[[Any], Any]) -> Tree:
  """Maps over a canonical state: `fn` over its parts, `other` over all other leaves."""
  return jax.tree.map(
    lambda node: fn(node) if is_part(node) else other(node), tree, is_leaf=is_part
  )


def is_slots(node: Any) -> bool:
  """Whether a node of a state is a placed part."""
  return isinstance(node, Slots)


def map_slots(fn: Callable[[Slots], Any], tree: Tree, other: Callable[[Any], Any]) -> Tree:
  """Maps over a placed state: `fn` over its placed parts, `other` over all other leaves."""
  return jax.tree.map(
    lambda node: fn(node) if is_slots(node) else other(node), tree, is_leaf=is_slots
  )


def _dtype(leaf: Any) -> Any:
  return leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf))
