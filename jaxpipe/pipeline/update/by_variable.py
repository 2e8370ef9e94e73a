"""Any optax transformation on placed trees, as it works on one leaf per variable.

Where a transformation sees only placed arrays, as `tx.update` of a placed tree does, it takes a
stack of layers or a row of many variables for one tensor: norms, factors, masks and orthogonal
updates are then those of something that is no variable. Here it is traced on the tree with one leaf
per variable, and what it computes is run where each variable lies (see `division`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.placing import check_mesh
from jaxpipe.pipeline.update.dataflow import Flow
from jaxpipe.pipeline.update.division import divide
from jaxpipe.pipeline.update.program import UPDATES, Role, Update
from jaxpipe.pipeline.update.slots import (
  Slot,
  Slots,
  SlotsLayout,
  StateLayouts,
  is_part,
  is_slots,
  map_slots,
)
from jaxpipe.pipeline.update.variables import Variables
from jaxpipe.schedules import Schedule
from jaxpipe.stack.module_spec import same_structure
from jaxpipe.stack.stack import LayerStack

Tree = Any


def by_variable(
  tx: optax.GradientTransformation, stack: LayerStack, schedule: Schedule, mesh: Mesh
) -> optax.GradientTransformationExtraArgs:
  """Returns a transformation of placed trees that computes what `tx` computes variable by variable.

  `tx` sees one leaf per variable, in its own shape, in the tree
  `{"embed": ..., "head": ..., "layers": {"0": ..., "1": ...}}`, so that a leaf's path reads
  `layers/3/inner/kernel`. Variables are coupled by single numbers only, such as a global norm.

  Args:
    tx: any optax transformation that joins no whole tensors of several variables.
    stack, schedule, mesh: what is trained, in which order, and where.

  Returns:
    `init(params)` and `update(grads, state, params=None, **extra)` on placed trees, inside or
    outside of `jax.jit`. The state lies on the mesh as the parameters do; each part of it that
    repeats their tree is a `Slots`. Further arguments are arrays, or placed trees of the structure
    of the parameters, and reach `tx` as such.

  Raises:
    ValueError: mesh, schedule and stack do not fit one another. `init` and `update` raise it for a
      transformation that joins whole tensors of several variables, for further arguments that it
      does not take or that are no arrays, and for trees that are not placed.
  """
  check_mesh(schedule, mesh)
  made = _ByVariable(tx, StateLayouts(Variables.of(stack, schedule, mesh)))
  return optax.GradientTransformationExtraArgs(made.init, made.update)


class _ByVariable:
  """The two functions of a transformation, with the programs made so far."""

  def __init__(self, tx: optax.GradientTransformation, layouts: StateLayouts) -> None:
    self.tx, self.layouts, self.variables = tx, layouts, layouts.variables
    self._programs: dict[Any, Any] = {}

  def init(self, params: Tree) -> Tree:
    """The state before the first update; see `by_variable`."""
    arrays = {"params": self.variables.named(params)}
    key = ("init", _described(arrays))
    if key not in self._programs:
      self._programs[key] = self._init_program(arrays)
    return self._programs[key](arrays)

  def update(
    self, updates: Tree, state: Tree, params: Tree | None = None, **extra: Any
  ) -> tuple[Tree, Tree]:
    """Updates of placed gradients, and the next state; see `by_variable`."""
    if extra and not isinstance(self.tx, optax.GradientTransformationExtraArgs):
      raise ValueError(
        f"the optimizer takes no further arguments, and {', '.join(sorted(extra))} was given; wrap"
        " it by optax.with_extra_args_support to have them ignored"
      )
    arrays = {"updates": self.variables.named(updates)}
    if params is not None:
      arrays["params"] = self.variables.named(params)
    # Of the further arguments, placed trees are cut by variable, and all else is whole everywhere.
    leaves, structure = jax.tree.flatten(extra, is_leaf=is_part)
    for i, leaf in enumerate(leaves):
      if is_part(leaf):
        arrays[f"extra{i}"] = self.variables.named(leaf)
    others = {i: _checked(extra, leaf) for i, leaf in enumerate(leaves) if not is_part(leaf)}
    state = map_slots(lambda part: part, state, jnp.asarray)
    key = (_described((arrays, state, others)), structure)
    if key not in self._programs:
      self._programs[key] = self._update_program(arrays, state, others, structure, len(leaves))
    named, state = self._programs[key](arrays, state, others)
    placed = jax.tree.unflatten(self.variables.structure, list(named.values()))
    return placed, state

  # Programs

  def _init_program(self, arrays: dict[str, dict[str, Any]]) -> Any:
    """Compiles `init` for parameters of these dtypes."""
    traced = _Traced(self.variables)
    tree = traced.tree_input("params", arrays["params"])
    jaxpr, shapes = _traced(self.tx.init, "init", tree)
    outs = traced.flow.trace(jaxpr, traced.numbers)
    placed = self.layouts.placed_shapes(shapes)
    run, _ = traced.divided(
      self.layouts, jax.tree.unflatten(jax.tree.structure(shapes), outs), placed
    )
    specs = self.layouts.specs(placed)
    parts, structure = jax.tree.flatten(placed, is_leaf=is_slots)

    def local(arrays: dict[str, dict[str, jax.Array]]) -> Tree:
      empty = [self._empty(part) for part in parts if is_slots(part)]
      _, slots, results = run({"params": arrays["params"]}, empty, {})
      return _joined(parts, structure, slots, results)

    return self._compiled(local, (self._tree_specs(arrays),), specs)

  def _update_program(
    self, arrays: dict[str, dict[str, Any]], state: Tree, others: Any, structure: Any, n: int
  ) -> Any:
    """Compiles `update` for arguments of these shapes, dtypes and structures."""
    traced = _Traced(self.variables)
    updates = traced.tree_input("updates", arrays["updates"])
    canonical = traced.state_input(self.layouts, state)
    params = traced.tree_input("params", arrays["params"]) if "params" in arrays else None
    given = [
      traced.tree_input(f"extra{i}", arrays[f"extra{i}"])
      if i not in others
      else traced.other_input(others[i])
      for i in range(n)
    ]
    extra = jax.tree.unflatten(structure, given)

    def call(updates: Tree, state: Tree, params: Tree, extra: Any) -> Any:
      return self.tx.update(updates, state, params, **extra)

    # Inputs are numbered in the order of the leaves of these arguments: see `_Traced`.
    jaxpr, (shapes, after) = _traced(call, "update", updates, canonical, params, extra)
    outs = traced.flow.trace(jaxpr, traced.ordered((updates, canonical, params, extra)))
    if not same_structure(shapes, self.variables.tree):
      raise ValueError(
        f"the optimizer returns updates of {jax.tree.structure(shapes)}, and parameters are"
        f" {jax.tree.structure(self.variables.tree)}"
      )
    _check_state(canonical, after)
    count = len(self.variables.each)
    new_state = jax.tree.unflatten(jax.tree.structure(after), outs[count:])
    run, others_in = traced.divided(self.layouts, new_state, state, outs[:count])
    dtypes = self._update_dtypes(shapes)
    parts, state_structure = jax.tree.flatten(state, is_leaf=is_slots)

    def local(arrays: Any, state: Tree, others: Any) -> Any:
      found = jax.tree.leaves(state, is_leaf=is_slots)
      slots = [part.arrays for part in found if is_slots(part)]
      values = [part for part in found if not is_slots(part)] + [others[i] for i in sorted(others)]
      trees = dict(arrays)
      trees["grads"] = arrays["updates"]
      trees["updates"] = {
        name: jnp.zeros(a.shape, dtypes[name]) for name, a in arrays["updates"].items()
      }
      new, slots, results = run(trees, slots, dict(zip(others_in, values, strict=True)))
      return new, _joined(parts, state_structure, slots, results)

    specs = self.layouts.specs(state)
    tree_specs = self._tree_specs(arrays)
    everywhere = jax.tree.map(lambda _: Spec(), others)
    return self._compiled(local, (tree_specs, specs, everywhere), (tree_specs["updates"], specs))

  def _compiled(self, local: Any, in_specs: Any, out_specs: Any) -> Any:
    """A function of each device's arrays as a compiled function of arrays on the mesh."""
    mesh = self.variables.mesh
    # Devices along other axes compute the same; nothing is differentiated.
    program = jax.shard_map(
      local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
    return jax.jit(program, out_shardings=places)

  def _tree_specs(self, arrays: dict[str, dict[str, Any]]) -> dict[str, dict[str, Spec]]:
    return {tree: dict(self.variables.specs) for tree in arrays}

  def _update_dtypes(self, shapes: Tree) -> dict[str, Any]:
    """Dtype of each array of updates: that of the updates of its variables."""
    found: dict[str, Any] = {}
    for variable, leaf in zip(self.variables.each, jax.tree.leaves(shapes), strict=True):
      name = variable.array
      found[name] = jnp.promote_types(found.get(name, leaf.dtype), leaf.dtype)
    return found

  def _empty(self, part: Slots) -> dict[str, jax.Array]:
    """This device's arrays of a part of the state, zero where `init` writes nothing."""
    layout, out = self.layouts.of(part), {}
    for name, array in layout.arrays.items():
      place = NamedSharding(self.variables.mesh, layout.specs[name])
      out[name] = jnp.zeros(place.shard_shape(array.shape), array.dtype)
    return out


class _Traced:
  """Inputs of a transformation, as it is traced on one leaf per variable.

  Attributes:
    flow: the operations.
    numbers: of all inputs, in the order in which they were made.
    inputs: number -> variable and role.
    others: numbers of the inputs that belong to no variable, in order.
  """

  def __init__(self, variables: Variables) -> None:
    self.variables, self.flow = variables, Flow()
    self.numbers: list[int] = []
    self.inputs: dict[int, tuple[int, Role]] = {}
    self.others: list[int] = []
    self._leaves: dict[int, int] = {}

  def _input(self, shape: Sequence[int], dtype: Any, variable: int | None, role: Role) -> Any:
    leaf = jax.ShapeDtypeStruct(tuple(shape), dtype)
    aval = jax.eval_shape(lambda x: x, leaf)
    number = self.flow.value(
      _Aval(tuple(shape), aval.dtype), 0 if variable is None else 1 << variable
    )
    self.numbers.append(number)
    self._leaves[id(leaf)] = number
    if variable is None:
      self.others.append(number)
    else:
      self.inputs[number] = (variable, role)
    return leaf

  def tree_input(self, tree: str, arrays: dict[str, Any]) -> Tree:
    """A placed tree, as shapes with one leaf per variable."""
    role = ("tree", "grads" if tree == "updates" else tree)
    leaves = [
      self._input(v.shape, arrays[v.array].dtype, i, role)
      for i, v in enumerate(self.variables.each)
    ]
    return jax.tree.unflatten(jax.tree.structure(self.variables.tree), leaves)

  def state_input(self, layouts: StateLayouts, state: Tree) -> Tree:
    """A placed state, as canonical shapes."""
    number = 0

    def of_part(part: Slots) -> Tree:
      nonlocal number
      roles = _slot_roles(number, layouts.of(part).slots)
      number += 1
      leaves = [
        self._input(shape, dtype, slot.variable, role)
        for (shape, dtype), slot, role in zip(
          part.leaves, layouts.of(part).slots, roles, strict=True
        )
      ]
      return jax.tree.unflatten(part.structure, leaves)

    return map_slots(of_part, state, self.other_input)

  def other_input(self, leaf: Any) -> Any:
    """An input that belongs to no variable, as a shape."""
    return self._input(np.shape(leaf), leaf.dtype, None, ())

  def ordered(self, arguments: Any) -> list[int]:
    """Numbers of the inputs in the order of the leaves of all arguments."""
    return [self._leaves[id(leaf)] for leaf in jax.tree.leaves(arguments)]

  def divided(
    self, layouts: StateLayouts, canonical: Tree, placed: Tree, updates: Sequence[Any] = ()
  ) -> tuple[Update, list[int]]:
    """Divides what was traced.

    Args:
      layouts: of states.
      canonical: values of the new state.
      placed: its placed shapes.
      updates: values of the updates.

    Returns:
      The program of a device, and the numbers of its inputs that belong to no variable.
    """
    outs: list[dict[Role, Any]] = [{} for _ in self.variables.each]
    roles: list[dict[Role, Slot]] = [{} for _ in self.variables.each]
    for i, ref in enumerate(updates):
      outs[i][UPDATES] = ref
    results: list[Any] = []
    found: list[SlotsLayout] = []
    structure: Any = jax.tree.structure(placed, is_leaf=is_slots)
    nodes = structure.flatten_up_to(canonical)
    for node, part in zip(nodes, jax.tree.leaves(placed, is_leaf=is_slots), strict=True):
      if not is_slots(part):
        results.append(node)
        continue
      layout = layouts.of(part)
      names = _slot_roles(len(found), layout.slots)
      found.append(layout)
      for ref, slot, role in zip(jax.tree.leaves(node), layout.slots, names, strict=True):
        outs[slot.variable][role] = ref
        roles[slot.variable][role] = slot
    division = divide(
      self.flow, self.inputs, outs, results, [variable.path for variable in self.variables.each]
    )
    return Update(self.variables, tuple(found), division, tuple(roles)), self.others


@dataclasses.dataclass(frozen=True)
class _Aval:
  """Shape and dtype of an input."""

  shape: tuple[int, ...]
  dtype: Any

  def str_short(self) -> str:
    """In words, as JAX has it for values that it traces."""
    return f"{self.dtype}{list(self.shape)}"


def _slot_roles(part: int, slots: Sequence[Slot]) -> list[Role]:
  """The role of each slot of a part: its number among those of its variable."""
  counts: dict[int, int] = {}
  roles: list[Role] = []
  for slot in slots:
    n = counts[slot.variable] = counts.get(slot.variable, -1) + 1
    roles.append(("slot", part, n))
  return roles


def _traced(fn: Any, name: str, *args: Any) -> tuple[Any, Any]:
  """The jaxpr of a function and the shapes that it returns."""
  try:
    return jax.make_jaxpr(fn, return_shape=True)(*args)
  except (TypeError, ValueError) as e:
    why = f"{e}".partition("\n")[0]
    raise ValueError(f"the optimizer's {name} cannot be traced variable by variable: {why}") from e


def _checked(extra: dict[str, Any], leaf: Any) -> jax.Array:
  """A further argument as an array."""
  if isinstance(leaf, jax.Array | np.ndarray | bool | int | float | np.generic):
    return jnp.asarray(leaf)
  names = [name for name, value in extra.items() if any(x is leaf for x in jax.tree.leaves(value))]
  raise ValueError(
    f"the optimizer's argument {', '.join(names)} is a {type(leaf).__name__}: by variable only"
    " arrays and placed trees are passed on; take a transformation that needs no such argument"
  )


def _check_state(before: Tree, after: Tree) -> None:
  """Raises ValueError where the next state is not of the structure and shapes of the last."""
  if not same_structure(before, after):
    raise ValueError(
      f"the optimizer's state changes from {jax.tree.structure(before)} to"
      f" {jax.tree.structure(after)}, which a placed state cannot"
    )
  for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
    if a.shape != b.shape:
      raise ValueError(
        f"the optimizer's state at {jax.tree_util.keystr(path)} changes from {list(a.shape)} to"
        f" {list(b.shape)}, which a placed state cannot"
      )


def _joined(parts: list[Any], structure: Any, slots: list[Any], results: list[Any]) -> Tree:
  """A placed state of new arrays, in the order of its nodes."""
  slots, results = list(slots), list(results)
  leaves = [
    dataclasses.replace(part, arrays=slots.pop(0))
    if is_slots(part)
    else results.pop(0).astype(part.dtype)
    for part in parts
  ]
  return jax.tree.unflatten(structure, leaves)


def _described(tree: Any) -> Any:
  """Structure, shapes and dtypes of a tree, as a key."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple((np.shape(leaf), str(leaf.dtype)) for leaf in leaves)
