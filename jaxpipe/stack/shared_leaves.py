"""Parameters that modules of several stages read, in a stack whose stages lie in rows of their own.

A tied parameter exists once, in the row of the stage that its owner stands in. A stage *borrows* it
when one of its modules reads it and another stage owns it. As every device runs every stage's code
on its own rows, borrowed leaves are handed to all of them:

    before the first tick   send:     owner's row -> every device, a sum over `stage` in which only
                                      the owner's device has anything but zeros
    after the last tick     collect:  gradients of all devices -> added to those in the owner's row

The optimizer then sees each parameter once, with its whole gradient.

Letters of shapes: S stages, V stages that a device holds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel import axes
from jaxpipe.parallel.flat import Flat, read_span, write_span
from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.protocol import PlacementLike
from jaxpipe.stack.network import Network, get_owned
from jaxpipe.stack.paths import set_path

Tree = Any


class LeafPlace(NamedTuple):
  """Where a shared leaf lies: in the row of its owner's stage.

  Attributes:
    stage: the stage whose module owns it.
    offset: where it begins in that stage's row, in elements.
    leaf: its shape and dtype; the dtype says which of the row's arrays holds it.
  """

  stage: int
  offset: int
  leaf: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, eq=False)
class SharedLeaves:
  """The leaves that several stages read, and how they travel.

  Attributes:
    network: all modules, and which parameters are tied.
    placement: which device holds which stage.
    stages: names of each stage's modules, [S][...].
    params: how each stage's own parameters lie in its row, [S].
  """

  network: Network
  placement: PlacementLike
  stages: tuple[tuple[str, ...], ...]
  params: tuple[Flat, ...]

  @functools.cached_property
  def borrowed(self) -> tuple[dict[str, str], ...]:
    """For each stage, the parameters it reads that another stage owns: path -> owner's path."""
    out = []
    for stage in self.stages:
      borrowed: dict[str, str] = {}
      for name in stage:
        for path, owner in self.network.owners(name).items():
          # What a neighbour in the same stage owns is read from its tree; see `with_neighbours`.
          if not _owns(stage, owner):
            borrowed[f"{name}/{path}"] = owner
      out.append(borrowed)
    return tuple(out)

  @functools.cached_property
  def paths(self) -> tuple[str, ...]:
    """Owners' paths of all leaves that some stage borrows, sorted."""
    return tuple(sorted({owner for borrowed in self.borrowed for owner in borrowed.values()}))

  def with_neighbours(self, s: int, name: str, trees: Mapping[str, Tree]) -> Tree:
    """A module's parameters with the leaves that other modules of its own stage own.

    Args:
      s: the stage.
      name: of one of its modules.
      trees: name -> parameters, of all modules of the stage.
    """
    params = trees[name]
    for path, owner in self.network.owners(name).items():
      if _owns(self.stages[s], owner):
        params = set_path(params, path, get_owned(trees, owner))
    return params

  def send(self, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Brings the shared leaves to every device; inside `shard_map`.

    Args:
      rows: dtype -> [V, width], the parameters of this device's stages.

    Returns:
      Owner's path -> the leaf, in its own shape and the same on all devices along `stage`.
    """
    out = {}
    for path in self.paths:
      place = self._place(path)
      sends, chunk = self._sender(place.stage)
      own = read_span(rows[str(place.leaf.dtype)], place.leaf.shape, place.offset, chunk)
      # All terms of the sum but one are zeros: nothing is rounded.
      out[path] = axes.total(jnp.where(sends, own, 0), STAGE)
    return out

  def collect(self, grads: Tree) -> Tree:
    """Adds the gradients of shared leaves to the owner's row; the transpose of `send`.

    Args:
      grads: of this device; `layers` is dtype -> [V, width], `shared` is owner's path -> gradient.

    Returns:
      The same tree without `shared`.
    """
    rows = dict(grads["layers"])
    for path, grad in grads["shared"].items():
      place = self._place(path)
      sends, chunk = self._sender(place.stage)
      name = str(place.leaf.dtype)
      # All devices run the same code; those that do not hold the owner's stage add zeros to
      # something else of their own.
      whole = jnp.where(sends, axes.total(grad, STAGE), 0)
      old = read_span(rows[name], place.leaf.shape, place.offset, chunk)
      rows[name] = write_span(rows[name], old + whole, place.offset, chunk)
    return {**{k: v for k, v in grads.items() if k != "shared"}, "layers": rows}

  def _place(self, path: str) -> LeafPlace:
    """Where the leaf of an owner's path lies."""
    for s, (stage, flat) in enumerate(zip(self.stages, self.params, strict=True)):
      if _owns(stage, path):
        # A row knows its leaves by their numbers in the flattened tree.
        numbers = jax.tree.unflatten(flat.structure, range(len(flat.leaves)))
        n = get_owned(numbers, path)
        return LeafPlace(s, flat.offsets[n], flat.leaves[n])
    raise AssertionError(path)

  def _sender(self, stage: int) -> tuple[jax.Array, jax.Array]:
    """Whether this device is the one that sends a stage's leaves, and as which chunk it holds it.

    A stage may live on several devices; only the first of them may send, or the sum would count
    its leaves twice.
    """
    d, v = next(
      (d, v)
      for v in range(self.placement.chunks)
      for d in range(self.placement.devices)
      if self.placement.stage(d, v) == stage
    )
    return lax.axis_index(STAGE) == d, jnp.int32(v)


def _owns(stage: tuple[str, ...], path: str) -> bool:
  """Whether the path of a leaf begins with the name of one of a stage's modules."""
  return any(path.startswith(f"{name}/") for name in stage)
