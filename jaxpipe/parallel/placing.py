"""Where each parameter lies: from canonical layer order to placement order, and back.

Canonical: layers in model order along the leading dim. Placed: the same shapes, but along that dim
stand the layers of device 0 (chunk by chunk), then those of device 1, and so on, so that an even
sharding over `stage` gives every device exactly its own. With one chunk a device the two orders are
the same. Embedding and head are replicated over `stage`, but for their tables where the schedule
cuts the vocabulary: of those, every device holds V / P rows. All other dims lie as the stack's
rules say (see `rules`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel import axes as axis
from jaxpipe.parallel.mesh import AXES, FSDP, STAGE, TENSOR
from jaxpipe.parallel.replicas import owned
from jaxpipe.parallel.rules import axes_of_entry, check_axes, describe

Tree = Any  # a pytree of arrays

_PARTS = {"embed", "layers", "head"}


def layers_per_stage(depth: int, schedule: Any) -> int:
  """Returns layers in each stage.

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


def layer_order(depth: int, schedule: Any) -> np.ndarray:
  """Canonical layer numbers in placement order: int32 [depth]."""
  each = layers_per_stage(depth, schedule)
  stages = [stage for row in owned(schedule.placement) for stage in row]
  return np.array([s * each + i for s in stages for i in range(each)], np.int32)


def layer_paths(depth: int, schedule: Any) -> tuple[tuple[int, ...], ...] | None:
  """Layers that each microbatch passes, in order; None where all pass all of them."""
  if schedule.paths is None:
    return None
  each = layers_per_stage(depth, schedule)
  return tuple(
    tuple(s * each + i for s in schedule.path(m) for i in range(each))
    for m in range(schedule.microbatches)
  )


def param_specs(tree: Tree, stack: Any, schedule: Any, mesh: Mesh) -> Tree:
  """Partition specs, one for every leaf of a placed tree of parameters.

  Raises:
    ValueError: the schedule cuts the vocabulary and the stack's tables cannot be, or the stack's
      rules do not fit the mesh.
  """
  sizes = dict(mesh.shape)
  check_axes(stack.rules, sizes)
  cut = stack.tables(schedule.devices) if schedule.vocabulary else frozenset()
  if cut and sizes.get(TENSOR, 1) > 1:
    raise ValueError(
      f"schedule {schedule.name} cuts the vocabulary over {schedule.devices} stages, and the mesh"
      f" over tensor:{sizes[TENSOR]}, which cannot be combined; take a schedule whose last stage"
      " has the head (head='last')"
    )

  def spec(path: Any, leaf: Any) -> Spec:
    name = describe(path)
    if name in cut:
      rows = leaf.shape[0] // schedule.devices
      inner = stack.rules.spec(name, (rows, *leaf.shape[1:]), {FSDP: sizes.get(FSDP, 1)})
      return Spec((STAGE, *axes_of_entry(inner[0])), *inner[1:])
    if name.startswith("layers/") or name == "layers":
      return Spec(STAGE, *stack.rules.spec(name, leaf.shape[1:], sizes))
    return stack.rules.spec(name, leaf.shape, sizes)

  return jax.tree.map_with_path(spec, tree)


def shardings(tree: Tree, stack: Any, schedule: Any, mesh: Mesh) -> Tree:
  """Where every leaf of a placed tree lies; see `param_specs`."""
  specs = param_specs(tree, stack, schedule, mesh)
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def place(params: Tree, stack: Any, schedule: Any, mesh: Mesh) -> Tree:
  """Moves a canonical tree (parameters, gradients, moments) to its places on the mesh.

  Args:
    params: tree of the shape of `stack.init(...)`, canonical layer order.
    stack: the `LayerStack`.
    schedule: says which device holds which layers.
    mesh: mesh with a `stage` axis of `schedule.devices`.

  Returns:
    The same tree in placement order, sharded. It may share buffers with the input: donate one only
    when done with the other.

  With several chunks a device the order of the layers changes, and neither shapes nor shardings can
  tell a placed tree from a canonical one: place a tree once, and hand the step nothing else.
  """
  check_mesh(schedule, mesh)
  rows = arranged(params, stack, schedule)
  return jax.device_put(rows, shardings(rows, stack, schedule, mesh))


def arranged(tree: Tree, stack: Any, schedule: Any) -> Tree:
  """A canonical tree in placement order and, where the stack lies packed, packed; not yet sharded.

  Args:
    tree: of the shapes of parameters or of state, of any dtypes.
    stack, schedule: as for `place`.
  """
  stack = stack.laid_out(schedule)
  rows = tree if stack.uniform else jax.jit(stack.pack)(tree)
  return _reorder(rows, layer_order(stack.depth, schedule))


def unplace(params: Tree, stack: Any, schedule: Any) -> Tree:
  """Inverse of `place`: the same values in canonical layer order."""
  stack = stack.laid_out(schedule)
  rows = _reorder(params, np.argsort(layer_order(stack.depth, schedule)).astype(np.int32))
  return rows if stack.uniform else jax.jit(stack.unpack)(rows)


def init_placed(
  stack: Any, key: jax.Array, schedule: Any, mesh: Mesh, *, state: bool = False
) -> Tree:
  """Creates each device's own layers on that device; see `LayerStack.init` and `init_state`.

  Args:
    stack: as it is laid out.
    key, schedule, mesh: as for `init`.
    state: whether it is the state that is made; of packed stacks.
  """
  check_mesh(schedule, mesh)
  order = layer_order(stack.depth, schedule)
  shapes = stack.state_shapes() if state else stack.param_shapes()
  specs = param_specs(shapes, stack, schedule, mesh)
  # A layer is cut as soon as it is made: a device never holds more than one of them whole.
  cuts = {**specs, "layers": jax.tree.map(lambda spec: Spec(*spec[1:]), specs["layers"])}

  options = {"state": True} if state else {}
  create = jax.shard_map(
    functools.partial(
      stack.init_layers_and_ends, cut=lambda part, tree: own_pieces(cuts[part], tree), **options
    ),
    mesh=mesh,
    in_specs=(Spec(), Spec(STAGE)),
    out_specs=specs,
    check_vma=False,  # nothing is differentiated, and initializers may loop from constants
  )
  return jax.jit(create)(key, order)


def own_pieces(specs: Tree, tree: Tree) -> Tree:
  """This device's pieces of leaves that it has whole; inside `shard_map`."""

  def own(spec: Spec, leaf: jax.Array) -> jax.Array:
    for dim, entry in enumerate(spec):
      axes = axes_of_entry(entry)
      n = leaf.shape[dim] // axis.size(axes)
      if axes:
        leaf = lax.dynamic_slice_in_dim(leaf, axis.index(axes) * n, n, dim)
    return leaf

  return jax.tree.map(own, specs, tree)


def gather_fsdp(specs: Tree, tree: Tree) -> Tree:
  """Leaves whole along `fsdp`, given this device's pieces; inside `shard_map`."""
  return _along_fsdp(axis.gather, specs, tree)


def scatter_fsdp(specs: Tree, tree: Tree) -> Tree:
  """Its transpose: adds over `fsdp`, and keeps this device's pieces."""
  return _along_fsdp(axis.scatter, specs, tree)


def _along_fsdp(move: Callable[..., jax.Array], specs: Tree, tree: Tree) -> Tree:
  def one(spec: Spec, leaf: jax.Array) -> jax.Array:
    for dim, entry in enumerate(spec):
      if FSDP in axes_of_entry(entry):
        leaf = move(leaf, FSDP, dim)
    return leaf

  return jax.tree.map(one, specs, tree)


def map_param_trees(fn: Callable[[Tree], Tree], tree: Tree, other: Callable[[Any], Any]) -> Tree:
  """Applies `fn` to every subtree of the parameters' shape, `other` to leaves outside them."""

  def one(node: Any) -> Any:
    return fn(node) if _is_params(node) else other(node)

  return jax.tree.map(one, tree, is_leaf=_is_params)


def _is_params(node: Any) -> bool:
  return isinstance(node, dict) and node.keys() == _PARTS


def check_mesh(schedule: Any, mesh: Mesh) -> None:
  """Raises ValueError for a mesh of unknown or explicit axes, or another size than the schedule."""
  strange = [name for name in mesh.axis_names if name not in AXES]
  if strange or any(kind is not AxisType.Auto for kind in mesh.axis_types):
    raise ValueError(
      f"mesh axes {dict(mesh.shape)} of types {[kind.name for kind in mesh.axis_types]}: only"
      f" {', '.join(AXES)} are supported, as Auto axes; build it with jaxpipe.make_mesh"
    )
  found = dict(mesh.shape).get(STAGE, 0)
  if found != schedule.devices:
    raise ValueError(
      f"schedule {schedule.name} is for {schedule.devices} devices but the mesh has {found} along"
      f" its `{STAGE}` axis; make them equal"
    )


def check_placed(params: Tree, stack: Any, schedule: Any, mesh: Mesh, state: Tree = None) -> None:
  """Raises ValueError where concrete parameters, or state, do not lie as `place` puts them.

  It sees that they are sharded as `place` shards them, which a tree that was never placed is not.
  """
  stack = stack.laid_out(schedule)
  _check_lies(params, stack.param_shapes(), stack, schedule, mesh, "params", "init")
  if state:
    _check_lies(state, stack.state_shapes(), stack, schedule, mesh, "state", "init_state")


def _check_lies(
  tree: Tree, shapes: Tree, stack: Any, schedule: Any, mesh: Mesh, what: str, init: str
) -> None:
  need, have = (
    {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    for tree in (shapes, tree)
  )
  remedy = (
    f"call jaxpipe.place({what}, stack, schedule, mesh) or stack.{init}(key, batch, schedule, mesh)"
  )
  for name in sorted({*need, *have}):
    if name not in need or name not in have or np.shape(have[name]) != need[name].shape:
      found = np.shape(have[name]) if name in have else "missing"
      wanted = need[name].shape if name in need else "nothing"
      raise ValueError(
        f"{what}{name} is {found}, and the stack has {wanted} there; give the step a tree of the"
        f" shape of stack.{init}(...): {remedy}"
      )
  want = shardings(shapes, stack, schedule, mesh)
  for (path, leaf), sharding in zip(
    jax.tree.leaves_with_path(tree), jax.tree.leaves(want), strict=True
  ):
    if isinstance(leaf, jax.core.Tracer):
      continue
    at = getattr(leaf, "sharding", None)
    if at is None or not at.is_equivalent_to(sharding, np.ndim(leaf)):
      raise ValueError(f"{what}{jax.tree_util.keystr(path)} is not on its stage; {remedy}")


def _reorder(tree: Tree, order: np.ndarray) -> Tree:
  if (order == np.arange(len(order))).all():
    return tree
  return {**tree, "layers": jax.tree.map(lambda leaf: _taken(leaf, order), tree["layers"])}


def _taken(leaf: Any, order: np.ndarray) -> jax.Array:
  """The layers of a leaf in another order, which lies where the leaf lies."""
  here = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
  # Left to itself, the result may lie whole on every device.
  return jax.jit(_take_layers, out_shardings=here)(leaf, order)


def _take_layers(leaf: jax.Array, order: jax.Array) -> jax.Array:
  return jnp.take(leaf, order, axis=0)
