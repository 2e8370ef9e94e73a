"""The weights of a device's layers, whole or in pieces along `fsdp`, as actions read them.

Where the mesh axis `fsdp` cuts the parameters, every device owns a piece of each leaf and reads the
leaf whole. When it is all-gathered depends on the schedule (ZeroPP, Tang et al., 2024):

    the schedule has no G    all leaves once, before the first tick; they stay until the last
    the schedule has G       one stage's at each G, into a slot of the ring `weights`, which is
                             another stage's after X has released them

What W reads is gathered before the first tick either way, for W may come after X. A layer's
matrices are not among it: W multiplies activations by cotangents, which F and I have left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.placing import gather_fsdp
from jaxpipe.parallel.rules import describe
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Index, Tree

Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters of all layers that a device holds.

  Attributes:
    layers: leaves `[V * each, ...]` of all V chunks, whole along `fsdp`, or this device's pieces of
      those that `later` names.
    specs: partition specs of the leaves, which say along which dim `fsdp` cuts.
    later: for each leaf in order, whether G gathers it; else it is whole before the first tick.
    each: layers of a stage.
    shared: for each leaf in order, the row of it that each layer of the model reads, [L]; None
      where every layer has a row of its own, which is most often all of them.
  """

  layers: Tree
  specs: Tree
  later: Sequence[bool]
  each: int
  shared: Sequence[Sequence[int] | None]

  @classmethod
  def of(
    cls,
    pieces: Tree,
    specs: Tree,
    later: Sequence[bool],
    each: int,
    shared_rows: Mapping[str, Sequence[int]],
  ) -> Weights:
    """Gathers at once, over `fsdp`, every leaf that no G will gather.

    Args:
      pieces: leaves `[V * each, ...]`, all of them this device's pieces along `fsdp`.
      specs, later, each: as of the attributes.
      shared_rows: as of the stack.
    """
    paths = [f"layers/{describe(path)}" for path, _ in jax.tree.leaves_with_path(pieces)]
    leaves, structure = jax.tree.flatten(pieces)
    now = [
      leaf if wait else gather_fsdp(spec, leaf)
      for spec, leaf, wait in zip(jax.tree.leaves(specs), leaves, later, strict=True)
    ]
    shared = [shared_rows.get(path) for path in paths]
    return cls(jax.tree.unflatten(structure, now), specs, later, each, shared)

  def kept(self) -> Leaves:
    """The leaves that stay whole for the step, for reports of memory."""
    leaves = jax.tree.leaves(self.layers)
    return [leaf for leaf, later in zip(leaves, self.later, strict=True) if not later]

  def whole(self) -> Tree:
    """Types of all leaves as if gathered, which are those of their gradients."""
    leaves, structure = jax.tree.flatten(self.layers)
    full = {
      i: jax.eval_shape(functools.partial(gather_fsdp, spec), leaf)
      for i, spec, leaf in self._later()
    }
    return jax.tree.unflatten(structure, [full.get(i, leaf) for i, leaf in enumerate(leaves)])

  def slot(self) -> Leaves:
    """Types of what one slot of the ring `weights` holds: one stage's gathered leaves."""
    return jax.eval_shape(self.gathered, 0)

  def gathered(self, first_layer: Index) -> Leaves:
    """G: gathers a stage's weights; its layers begin at `first_layer` among this device's."""
    return [
      gather_fsdp(spec, lax.dynamic_slice_in_dim(leaf, first_layer, self.each))
      for _, spec, leaf in self._later()
    ]

  def rows(self, held: Index, layer: Index) -> list[Index]:
    """Where a layer lies in each leaf.

    Args:
      held: its number among the layers of this device.
      layer: its number in the model.
    """
    return [held if of is None else jnp.asarray(of, jnp.int32)[layer] for of in self.shared]

  def reader(
    self, ring: Leaves, slot: Index, rows: Callable[[Index], Sequence[Index]]
  ) -> Callable[[Index], Tree]:
    """Returns a function from i to the parameters of the stage's i-th layer.

    Args:
      ring: the ring `weights`, from which leaves that G has gathered are read.
      slot: its slot that holds this stage's weights.
      rows: for the stage's i-th layer, where it lies in each leaf, for all other leaves.
    """
    leaves, structure = jax.tree.flatten(self.layers)
    held = dict(zip((i for i, *_ in self._later()), ring, strict=True))

    def read(layer: Index) -> Tree:
      return jax.tree.unflatten(
        structure,
        [
          # One layer at a time: a slice of all of the stage's layers would be copied for the loop.
          rings.get(held[i], slot, layer) if i in held else rings.get(leaf, row)
          for i, (leaf, row) in enumerate(zip(leaves, rows(layer), strict=True))
        ],
      )

    return read

  def _later(self) -> Iterator[tuple[int, Any, jax.Array]]:
    """Yields number, partition spec and pieces of every leaf that G gathers."""
    leaves, specs = jax.tree.leaves(self.layers), jax.tree.leaves(self.specs)
    for i, (spec, leaf, later) in enumerate(zip(specs, leaves, self.later, strict=True)):
      if later:
        yield i, spec, leaf
