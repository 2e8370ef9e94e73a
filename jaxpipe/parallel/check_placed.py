"""Refuses a step whose parameters or state were never placed on the mesh.

A canonical tree has the shapes of a placed one, and JAX would take it: it would move every array
first, and with several chunks a device read the layers in the wrong order. So a step compares where
its arguments lie with where `place` puts them, before anything is compiled.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.parallel.placing import shardings
from jaxpipe.parallel.protocol import PlaceableStack, ScheduleLike

Tree = Any  # a pytree of arrays


def check_placed(
  params: Tree, stack: PlaceableStack, schedule: ScheduleLike, mesh: Mesh, state: Tree = None
) -> None:
  """Checks that concrete parameters, and model state, lie as `place` puts them.

  A tree that was never placed is sharded otherwise, and found. One placed for another order of the
  layers is not: its shapes and shardings are the same.

  Args:
    params: parameters as a step is given them; tracers among them are not checked for their place.
    stack: the `LayerStack`.
    schedule: says which device holds which layers.
    mesh: where they should lie.
    state: model state as a step is given it; None or empty is not checked.

  Raises:
    ValueError: a leaf that is missing, of another shape or elsewhere; names it and the remedy.
  """
  stack = stack.laid_out(schedule)
  _check_lies(params, stack.param_shapes(), stack, schedule, mesh, "params", "init")
  if state:
    _check_lies(state, stack.state_shapes(), stack, schedule, mesh, "state", "init_state")


def _check_lies(
  tree: Tree,
  shapes: Tree,
  stack: PlaceableStack,
  schedule: ScheduleLike,
  mesh: Mesh,
  what: str,
  init: str,
) -> None:
  """Checks one tree against shapes, then against shardings; `what` and `init` are for messages."""
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
    # NumPy arrays have no sharding. Specs that differ in axes of one device are equivalent.
    at = getattr(leaf, "sharding", None)
    if at is None or not at.is_equivalent_to(sharding, np.ndim(leaf)):
      raise ValueError(f"{what}{jax.tree_util.keystr(path)} is not on its stage; {remedy}")
