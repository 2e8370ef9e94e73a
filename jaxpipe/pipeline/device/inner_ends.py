"""The ends of a packed stack: embedding and head are modules of its first and last stage.

Nothing enters the first stage, and what the last stage returns is the result itself,
`loss_sum, (weight, metrics)`, packed like an activation. The loss's gradient is 1 and waits
nowhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxpipe.parallel.flat import Flat
from jaxpipe.pipeline.device.carry import Carry, Totals, count
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.now import Now
from jaxpipe.pipeline.device.protocols import Leaves
from jaxpipe.pipeline.device.whole_ends import embedded_or_arrived
from jaxpipe.pipeline.layer.trace import trace
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.schedules import Kind


@dataclasses.dataclass(frozen=True)
class InnerEnds:
  """Ends that stand inside stages; `Ends` describes the methods.

  Attributes:
    context: the device.
    result: how the last stage's `loss_sum, (weight, metrics)` lies in the buffers that travel.
  """

  context: DeviceContext
  result: Flat

  def held(self) -> dict[str, Tree]:
    """Nothing waits in the ring `vocabulary`."""
    return {}

  def heaviest(self) -> Any:
    """The jaxpr of nothing: the work of these ends is counted with their stages."""
    return trace(lambda: ()).jaxpr

  def enter(self, carry: Carry, now: Now) -> Carry:
    """Does nothing: the first stage embeds."""
    return carry

  def passes(self, carry: Carry, now: Now) -> Carry:
    """Does nothing: there are no passes S and T."""
    return carry

  def input(self, carry: Carry, now: Now) -> Leaves:
    """The stage's input: at the first stage zeros, which it does not read, else what arrived."""

    def nothing(ring: Tree) -> Leaves:
      return jax.tree.leaves(self.context.zeros(self.context.x))

    return embedded_or_arrived(nothing, carry, now)

  def leave(self, carry: Carry, now: Now, y: Leaves) -> Carry:
    """After F: adds the result of a microbatch that has left the last stage."""
    packed = jax.tree.unflatten(jax.tree.structure(self.context.x), y)

    def add(totals: Totals) -> Totals:
      return count(totals, *self.result.unpack(packed))

    # In evaluation and in training alike: the gradient of the loss is taken inside the last stage's
    # backward, and nothing has to wait for it here.
    totals = now.at_end("last", [Kind.F], add, lambda same: same, carry.totals)
    return carry._replace(totals=totals)

  def back_at_input(self, carry: Carry, now: Now, dx: Leaves) -> Carry:
    """Does nothing: the embedding's gradient is part of the first stage's."""
    return carry
