"""The part of a schedule that the walk and the legality checks read.

`Schedule.check` calls the checks, so the checks cannot import `Schedule`. They are written for this
protocol, which names the lists of the devices and what is needed to interpret them.

  schedule ──▶ checks ──▶ walk ──▶ protocol ──▶ placement ──▶ actions ──▶ kinds
"""

from typing import Protocol

from jaxpipe.schedules.actions import Order
from jaxpipe.schedules.placement import Placement

# One path per microbatch: the stages it visits, in order.
Paths = tuple[tuple[int, ...], ...]


# `[d][i]` is the tick of the i-th step of device d's list.
Ticks = tuple[tuple[int, ...], ...]


class OrderedActions(Protocol):
  """One training step's work in order; `Schedule` is the class that has all of this."""

  @property
  def placement(self) -> Placement:
    """The placement of S stages on P devices."""

  @property
  def microbatches(self) -> int:
    """Number of microbatches, M."""

  @property
  def order(self) -> Order:
    """One list of steps per device, first to last; a legal schedule has P of them."""

  @property
  def paths(self) -> Paths | None:
    """For each of M microbatches the stages it visits; None where all visit all, ascending."""

  @property
  def vocabulary(self) -> int:
    """Barriers round an output layer that is sharded over all devices, 1 or 2; else 0."""

  @property
  def ticks(self) -> Ticks | None:
    """The tick of every step in one program; None where each is as early as can be."""

  @property
  def devices(self) -> int:
    """Number of devices, P."""

  @property
  def stages(self) -> int:
    """Number of stages, S."""

  def path(self, microbatch: int) -> tuple[int, ...]:
    """The stages that a microbatch visits, in order; all of them where `paths` does not say."""
