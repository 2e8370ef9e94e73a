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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax

from jaxpipe.parallel.placing import gather_fsdp
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
  """

  layers: Tree
  specs: Tree
  later: Sequence[bool]
  each: int

  @classmethod
  def of(cls, pieces: Tree, specs: Tree, later: Sequence[bool], each: int) -> Weights:
    """Gathers at once, over `fsdp`, every leaf that no G will gather.

    Args:
      pieces: leaves `[V * each, ...]`, all of them this device's pieces along `fsdp`.
      specs, later, each: as of the attributes.
    """
    leaves, structure = jax.tree.flatten(pieces)
    now = [
      leaf if wait else gather_fsdp(spec, leaf)
      for spec, leaf, wait in zip(jax.tree.leaves(specs), leaves, later, strict=True)
    ]
    return cls(jax.tree.unflatten(structure, now), specs, later, each)

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

  def reader(self, ring: Leaves, slot: Index, first_layer: Index) -> Callable[[Index], Tree]:
    """Returns a function from i to the parameters of the stage's i-th layer.

    Args:
      ring: the ring `weights`, from which leaves that G has gathered are read.
      slot: its slot that holds this stage's weights.
      first_layer: where the stage's layers begin among this device's, for all other leaves.
    """
    leaves, structure = jax.tree.flatten(self.layers)
    held = dict(zip((i for i, *_ in self._later()), ring, strict=True))

    def read(layer: Index) -> Tree:
      return jax.tree.unflatten(
        structure,
        [
          # One layer at a time: a slice of all of the stage's layers would be copied for the loop.
          rings.get(held[i], slot, layer) if i in held else rings.get(leaf, first_layer + layer)
          for i, leaf in enumerate(leaves)
        ],
      )

    return read

  def _later(self) -> Iterator[tuple[int, Any, jax.Array]]:
    """Yields number, partition spec and pieces of every leaf that G gathers."""
    leaves, specs = jax.tree.leaves(self.layers), jax.tree.leaves(self.specs)
    for i, (spec, leaf, later) in enumerate(zip(specs, leaves, self.later, strict=True)):
      if later:
        yield i, spec, leaf
