"""Where each parameter lies on the mesh: canonical order, placement order, and the way between.

A *canonical* tree `{"embed": ..., "layers": ..., "head": ...}` has the layers in model order along
the leading dim of the leaves under `layers`. Users, checkpoints and the unpipelined reference see
it. A *placed* tree has the same values in *placement order*: the layers of device 0 (chunk by
chunk), then those of device 1, and so on. An even sharding of that dim over `stage` then gives each
device its own layers. With 8 layers, P = 2 devices and V = 2 chunks a device there are S = 4 stages
of two layers, and stage s lies on device s % 2:

    canonical order    0 1 | 2 3 | 4 5 | 6 7      stage 0 | stage 1 | stage 2 | stage 3
           |     ^
     place |     | unplace
           v     |
    placement order    0 1   4 5 | 2 3   6 7      device 0: stages 0, 2 | device 1: stages 1, 3

With one chunk a device the two orders are the same. A stack whose layers are not alike is *packed*
first: each stage becomes one row of an array [S, width] (see `flat`), and these rows take the place
of the layers.

The other dims of a leaf lie as the stack's rules say (see `rules`). A leaf that layers share has a
row for each layer that owns one, in canonical order, and every stage has them all. Embedding and
head are replicated over `stage`, except for tables that a schedule cuts over the stages: of such a
table every device holds one P-th of the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel import axes as axis
from jaxpipe.parallel.compiled_packing import pack, unpack
from jaxpipe.parallel.mesh import FSDP, STAGE, TENSOR, stages_of
from jaxpipe.parallel.protocol import PlaceableStack, ScheduleLike
from jaxpipe.parallel.replicas import owned
from jaxpipe.parallel.rules import axes_of_entry, check_axes, describe

Tree = Any  # a pytree of arrays

_PARTS = {"embed", "layers", "head"}


def layers_per_stage(depth: int, schedule: ScheduleLike) -> int:
  """Returns the number of layers in each stage, `depth / S`.

  Raises:
    ValueError: depth is not a multiple of the number of stages.
  """
  if depth % schedule.stages:
    fits = [n for n in range(1, depth + 1) if depth % n == 0]
    near = min(fits, key=lambda n: (abs(n - schedule.stages), n))
    raise ValueError(
      f"{depth} layers cannot fill {schedule.stages} stages evenly; use {near} stages,"
      f" or a multiple of {schedule.stages} layers"
    )
  return depth // schedule.stages


def layer_order(depth: int, schedule: ScheduleLike) -> np.ndarray:
  """Returns the permutation from canonical order to placement order.

  Args:
    depth: number of layers of the stack, a multiple of the schedule's stages.
    schedule: says which device owns which stages.

  Returns:
    int32 [depth]: the canonical number of the layer at each place of placement order, such as
    `[0, 1, 4, 5, 2, 3, 6, 7]` in the diagram of this module. `np.argsort` of it leads back.
  """
  each = layers_per_stage(depth, schedule)
  stages = [stage for row in owned(schedule.placement) for stage in row]
  return np.array([s * each + i for s in stages for i in range(each)], np.int32)


def layer_paths(depth: int, schedule: ScheduleLike) -> tuple[tuple[int, ...], ...] | None:
  """Returns the canonical layers that each microbatch passes, in order.

  Args:
    depth: number of layers of the stack.
    schedule: may let microbatches skip stages.

  Returns:
    One tuple of layer numbers for each of M microbatches; None where all pass all layers.
  """
  if schedule.paths is None:
    return None
  each = layers_per_stage(depth, schedule)
  return tuple(
    tuple(s * each + i for s in schedule.path(m) for i in range(each))
    for m in range(schedule.microbatches)
  )


def param_specs(tree: Tree, stack: PlaceableStack, schedule: ScheduleLike, mesh: Mesh) -> Tree:
  """Returns a partition spec for every leaf of a placed tree.

  Args:
    tree: arrays or their shapes, in the structure of the laid-out stack's parameters.
    stack: the stack, laid out or as the user made it; its rules and its tables are read.
    schedule: may cut the vocabulary over the stages.
    mesh: its axis sizes decide which dims are cut.

  Returns:
    A tree of `PartitionSpec`s, each with one entry for every dim of its leaf.

  Raises:
    ValueError: the schedule cuts the vocabulary and the stack's tables cannot be, or the stack's
      rules do not fit the mesh.
  """
  sizes = dict(mesh.shape)
  check_axes(stack.rules, sizes)
  cut = stack.tables(schedule.devices) if schedule.vocabulary else frozenset()
  shared = stack.shared_rows
  if cut and sizes.get(TENSOR, 1) > 1:
    raise ValueError(
      f"schedule {schedule.name} cuts the vocabulary over {schedule.devices} stages, and the mesh"
      f" over tensor:{sizes[TENSOR]}, which cannot be combined; take a schedule whose last stage"
      " has the head (head='last')"
    )

  def spec(path: Any, leaf: Any) -> Spec:
    name = describe(path)
    if name in cut:
      # The rows that one stage holds are cut further over `fsdp`, and over nothing else.
      rows = leaf.shape[0] // schedule.devices
      inner = stack.rules.spec(name, (rows, *leaf.shape[1:]), {FSDP: sizes.get(FSDP, 1)})
      return Spec((STAGE, *axes_of_entry(inner[0])), *inner[1:])
    if name.startswith("layers/") or name == "layers":
      # Rules describe one layer: the leading dim is not theirs.
      dealt_out = None if name in shared else STAGE
      return Spec(dealt_out, *stack.rules.spec(name, leaf.shape[1:], sizes))
    return stack.rules.spec(name, leaf.shape, sizes)

  return jax.tree.map_with_path(spec, tree)


def shardings(tree: Tree, stack: PlaceableStack, schedule: ScheduleLike, mesh: Mesh) -> Tree:
  """Returns a `NamedSharding` for every leaf of a placed tree.

  Args and Raises are those of `param_specs`, whose specs these shardings carry.
  """
  specs = param_specs(tree, stack, schedule, mesh)
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def place(params: Tree, stack: PlaceableStack, schedule: ScheduleLike, mesh: Mesh) -> Tree:
  """Moves a canonical tree (parameters, gradients, moments) to its places on the mesh.

  With several chunks a device the order of the layers changes, and neither shapes nor shardings can
  tell a placed tree from a canonical one: place a tree once, and hand the step nothing else.

  Args:
    params: tree of the shape of `stack.init(...)`, canonical layer order.
    stack: the `LayerStack`.
    schedule: says which device holds which layers.
    mesh: mesh with a `stage` axis of `schedule.devices`.

  Returns:
    The same tree in placement order, sharded. It may share buffers with the input: donate one only
    when done with the other.

  Raises:
    ValueError: the mesh does not fit the schedule, or the stack does not fit both.
  """
  check_mesh(schedule, mesh)
  rows = arranged(params, stack, schedule)
  return jax.device_put(rows, shardings(rows, stack, schedule, mesh))


def arranged(tree: Tree, stack: PlaceableStack, schedule: ScheduleLike) -> Tree:
  """Returns a canonical tree in placement order, packed where the stack is, and not yet sharded.

  Args:
    tree: arrays of the shapes of parameters or of model state, of any dtypes.
    stack: the `LayerStack`.
    schedule: says which device holds which layers.
  """
  laid = stack.laid_out(schedule)
  rows = tree if laid.uniform else pack(tree, laid, stack, schedule.placement)
  return _reorder(rows, laid, layer_order(laid.depth, schedule))


def unplace(params: Tree, stack: PlaceableStack, schedule: ScheduleLike) -> Tree:
  """Brings a placed tree back to canonical layer order; the inverse of `place`.

  Args:
    params: placed parameters, gradients, moments or model state.
    stack: the `LayerStack`.
    schedule: the one that the tree was placed by.

  Returns:
    The same values in the canonical tree, a leaf for every variable of every module. Where each
    leaf lies on the mesh is left as it comes.
  """
  laid = stack.laid_out(schedule)
  rows = _reorder(params, laid, np.argsort(layer_order(laid.depth, schedule)).astype(np.int32))
  return rows if laid.uniform else unpack(rows, laid, stack, schedule.placement)


def init_placed(
  stack: PlaceableStack,
  key: jax.Array,
  schedule: ScheduleLike,
  mesh: Mesh,
  *,
  state: bool = False,
) -> Tree:
  """Creates each device's own layers on that device; see `LayerStack.init` and `init_state`.

  Args:
    stack: the stack as it is laid out (`stack.laid_out(schedule)`).
    key: PRNG key; a layer's values depend on it and on the layer's canonical number alone.
    schedule: says which device holds which layers.
    mesh: mesh with a `stage` axis of `schedule.devices`.
    state: whether to make the model state in place of the parameters.

  Returns:
    The placed tree; its whole never exists in one place.

  Raises:
    ValueError: the mesh does not fit the schedule or the stack's rules.
  """
  check_mesh(schedule, mesh)
  order = layer_order(stack.depth, schedule)
  shapes = stack.state_shapes() if state else stack.param_shapes()
  specs = param_specs(shapes, stack, schedule, mesh)
  # A layer is cut as soon as it is made: a device never holds more than one of them whole.
  cuts = {**specs, "layers": jax.tree.map(lambda spec: Spec(*spec[1:]), specs["layers"])}

  create = jax.shard_map(
    functools.partial(
      stack.init_layers_and_ends, cut=lambda part, tree: own_pieces(cuts[part], tree), state=state
    ),
    mesh=mesh,
    # `order` is sharded over `stage`: each device is given the numbers of its own layers.
    in_specs=(Spec(), Spec(STAGE)),
    out_specs=specs,
    check_vma=False,  # nothing is differentiated, and initializers may loop from constants
  )
  return jax.jit(create)(key, order)


def own_pieces(specs: Tree, tree: Tree) -> Tree:
  """Cuts this device's pieces out of leaves that it has whole; for use inside `shard_map`.

  Args:
    specs: a partition spec for each leaf.
    tree: arrays of the whole shapes, the same on every device.

  Returns:
    The tree with each dim divided by the number of devices along its axes.
  """

  def own(spec: Spec, leaf: jax.Array) -> jax.Array:
    for dim, entry in enumerate(spec):
      axes = axes_of_entry(entry)
      n = leaf.shape[dim] // axis.size(axes)
      if axes:
        leaf = lax.dynamic_slice_in_dim(leaf, axis.index(axes) * n, n, dim)
    return leaf

  return jax.tree.map(own, specs, tree)


def gather_fsdp(specs: Tree, tree: Tree) -> Tree:
  """All-gathers over `fsdp`: each device's pieces to whole leaves; for use inside `shard_map`.

  Args:
    specs: a partition spec for each leaf, one entry for every dim.
    tree: this device's pieces. Dims that other axes cut stay cut.

  Returns:
    The tree, the dim that `fsdp` cuts n times as long, for n devices along it.
  """
  return _along_fsdp(axis.gather, specs, tree)


def scatter_fsdp(specs: Tree, tree: Tree) -> Tree:
  """Reduce-scatters over `fsdp`, the transpose of `gather_fsdp`; for use inside `shard_map`.

  Args:
    specs: a partition spec for each leaf, one entry for every dim.
    tree: gradients of the leaves as `gather_fsdp` returns them.

  Returns:
    The sums over `fsdp`, of which every device keeps its own pieces.
  """
  return _along_fsdp(axis.scatter, specs, tree)


def _along_fsdp(move: Callable[..., jax.Array], specs: Tree, tree: Tree) -> Tree:
  """Applies a collective over `fsdp` to every leaf, along the dim that `fsdp` cuts."""

  def one(spec: Spec, leaf: jax.Array) -> jax.Array:
    for dim, entry in enumerate(spec):
      # At most one dim of a leaf has `fsdp`, where it is the innermost axis: joining its pieces
      # leaves what the outer axes of that dim cut off, in order.
      if FSDP in axes_of_entry(entry):
        leaf = move(leaf, FSDP, dim)
    return leaf

  return jax.tree.map(one, specs, tree)


def map_param_trees(fn: Callable[[Tree], Tree], tree: Tree, other: Callable[[Any], Any]) -> Tree:
  """Maps over a tree that holds parameter trees somewhere inside, such as an optimizer's state.

  Args:
    fn: applied to every subtree that is a dict of exactly `embed`, `layers` and `head`.
    tree: any pytree.
    other: applied to the leaves outside such subtrees, such as a step counter.
  """

  def one(node: Any) -> Any:
    return fn(node) if _is_params(node) else other(node)

  return jax.tree.map(one, tree, is_leaf=_is_params)


def _is_params(node: Any) -> bool:
  """Whether a node of a pytree has the three parts of a parameter tree."""
  # By their names: an optimizer's state says nowhere which of its parts are moments.
  return isinstance(node, dict) and node.keys() == _PARTS


def check_mesh(schedule: ScheduleLike, mesh: Mesh) -> None:
  """Raises ValueError for a mesh that `stages_of` refuses, or of another size than the schedule."""
  found = stages_of(mesh)
  if found != schedule.devices:
    raise ValueError(
      f"schedule {schedule.name} is for {schedule.devices} devices but the mesh has {found} along"
      f" its `{STAGE}` axis; make them equal"
    )


def map_rows(fn: Callable[[Any], Any], layers: Tree, shared: Container[str]) -> Tree:
  """Maps over the leaves of `layers` whose rows are dealt out to the stages.

  Args:
    fn: applied to each of them.
    layers: the part `layers` of a tree.
    shared: paths of the leaves that stay as they are, such as `layers/kernel`: `shared_rows`.
  """

  def one(path: Any, leaf: Any) -> Any:
    return leaf if f"layers/{describe(path)}" in shared else fn(leaf)

  return jax.tree.map_with_path(one, layers)


def _reorder(tree: Tree, stack: PlaceableStack, order: np.ndarray) -> Tree:
  """Puts the layers of a tree in another order; the very same tree where the order is its own."""
  if (order == np.arange(len(order))).all():
    return tree
  taken = map_rows(lambda leaf: _taken(leaf, order), tree["layers"], stack.shared_rows)
  return {**tree, "layers": taken}


def _taken(leaf: Any, order: np.ndarray) -> jax.Array:
  """The layers of a leaf in another order, in the sharding that the leaf has."""
  sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
  # Left to itself, the result may lie whole on every device. JAX finds the compiled program by the
  # function, which is always the same, and by the sharding's value: a new `jit` compiles nothing.
  return jax.jit(_take_layers, out_shardings=sharding)(leaf, order)


def _take_layers(leaf: jax.Array, order: jax.Array) -> jax.Array:
  """The rows of a leaf [depth, ...] in the order of int32 [depth]."""
  return jnp.take(leaf, order, axis=0)
