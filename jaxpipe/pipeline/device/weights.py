"""The weights of a device's layers, as actions read them.

Where `fsdp` cuts the parameters, every device keeps a piece of each, and reads them whole:

    the schedule has no G    gathered once, before the first tick; kept to the last
    the schedule has G       gathered there, a stage at a time, into a slot of the ring `weights`,
                             which is another stage's after X

What W reads stays whole for the step either way, for W may come after X. A layer's matrices are not
among it: W multiplies what F and I left.
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
    layers: leaves [V * layers, ...], whole, or this device's pieces where `later` says so.
    specs: partition specs of the leaves.
    later: for each leaf, whether G gathers it.
    each: layers of a stage.
  """

  layers: Tree
  specs: Tree
  later: Sequence[bool]
  each: int

  @classmethod
  def of(cls, pieces: Tree, specs: Tree, later: Sequence[bool], each: int) -> Weights:
    """Gathers now what G does not; arguments as above, but all leaves in pieces."""
    leaves, structure = jax.tree.flatten(pieces)
    now = [
      leaf if wait else gather_fsdp(spec, leaf)
      for spec, leaf, wait in zip(jax.tree.leaves(specs), leaves, later, strict=True)
    ]
    return cls(jax.tree.unflatten(structure, now), specs, later, each)

  def kept(self) -> Leaves:
    """The leaves that are whole for the step."""
    leaves = jax.tree.leaves(self.layers)
    return [leaf for leaf, later in zip(leaves, self.later, strict=True) if not later]

  def whole(self) -> Tree:
    """Stand-ins of the parameters, all gathered."""
    leaves, structure = jax.tree.flatten(self.layers)
    full = {
      i: jax.eval_shape(functools.partial(gather_fsdp, spec), leaf)
      for i, spec, leaf in self._later()
    }
    return jax.tree.unflatten(structure, [full.get(i, leaf) for i, leaf in enumerate(leaves)])

  def slot(self) -> Leaves:
    """Stand-ins of what a slot of the ring holds."""
    return jax.eval_shape(self.gathered, 0)

  def gathered(self, first_layer: Index) -> Leaves:
    """G: a stage's layers, which begin at `first_layer`, of every leaf that it gathers."""
    return [
      gather_fsdp(spec, lax.dynamic_slice_in_dim(leaf, first_layer, self.each))
      for _, spec, leaf in self._later()
    ]

  def reader(self, ring: Leaves, slot: Index, first_layer: Index) -> Callable[[Index], Tree]:
    """Returns `i -> parameters of the stage's i-th layer`."""
    leaves, structure = jax.tree.flatten(self.layers)
    held = dict(zip((i for i, *_ in self._later()), ring, strict=True))

    def read(layer: Index) -> Tree:
      return jax.tree.unflatten(
        structure,
        [
          rings.get(held[i], slot, layer) if i in held else rings.get(leaf, first_layer + layer)
          for i, leaf in enumerate(leaves)
        ],
      )

    return read

  def _later(self) -> Iterator[tuple[int, Any, jax.Array]]:
    """Number, spec and pieces of every leaf that G gathers."""
    leaves, specs = jax.tree.leaves(self.layers), jax.tree.leaves(self.specs)
    for i, (spec, leaf, later) in enumerate(zip(specs, leaves, self.later, strict=True)):
      if later:
        yield i, spec, leaf
