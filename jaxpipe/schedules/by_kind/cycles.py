"""The table of ticks by kind that constructions fill, and the schedule that it becomes.

In one program, devices that exchange on a tick wait for one another, so that a tick on which one
does F and another B lasts as long as B. By kind, every tick is a forward, a backward or a weight
gradient for all devices at once. Time is cut into *cycles*, each of an F tick, then an I tick, then
a W tick (or an F and a B tick), of which those are left out on which no device works:

    cycle       0   1   2   3   4        eager 1F1B on P=2, M=3, with a fused backward
    tick of     F   F B F B F B   B
    device 0    0   1   2 0   1   2
    device 1        0 0 1 1 2 2

A device without work on a tick may do a weight gradient there that has waited, as a *guest*: it is
no longer than what the others do where W <= F and I.
"""

import collections
import dataclasses
from collections.abc import Container

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.ticks import without_gaps

# The places of a cycle: its F tick, its I or B tick, its W tick.
PLACES = 3
_F, _I, _W = range(PLACES)


@dataclasses.dataclass
class Cycles:
  """Which action each device does on which tick, which is `PLACES` times its cycle plus its place.

  Attributes:
    placement: which device holds which stage.
    microbatches: number of microbatches, M.
    rows: for each of P devices, tick -> action.
  """

  placement: Placement
  microbatches: int
  rows: list[dict[int, Action]]

  @classmethod
  def empty(cls, placement: Placement, microbatches: int) -> "Cycles":
    """A table without actions."""
    return cls(placement, microbatches, [{} for _ in range(placement.devices)])

  def forward(self, device: int, cycle: int, stage: int, microbatch: int) -> None:
    """Puts an F on the F tick of a cycle."""
    self.rows[device][PLACES * cycle + _F] = Action(stage, Kind.F, microbatch)

  def backward(self, device: int, cycle: int, kind: Kind, stage: int, microbatch: int) -> None:
    """Puts a B or an I on the second tick of a cycle."""
    self.rows[device][PLACES * cycle + _I] = Action(stage, kind, microbatch)

  def weight_grads_at_once(self) -> None:
    """Puts every W on the W tick of its I's cycle: a fused backward in two actions."""
    for row in self.rows:
      for tick, action in list(row.items()):
        if action.kind is Kind.I:
          row[tick - _I + _W] = dataclasses.replace(action, kind=Kind.W)

  def weight_grads_late(self, none_on: Container[int]) -> None:
    """Puts every W on the first tick after its I that is for W, or where its device idles.

    A device idles on F ticks up to the last F of all, and on I ticks from the first I to the last.

    Args:
      none_on: cycles without a W tick.
    """
    ticks = [(tick, action.kind) for row in self.rows for tick, action in row.items()]
    last_f = max(tick for tick, kind in ticks if kind is Kind.F) // PLACES
    cycles_of_i = [tick // PLACES for tick, kind in ticks if kind is Kind.I]
    for row in self.rows:
      waiting: collections.deque[Action] = collections.deque()
      left = sum(action.kind is Kind.I for action in row.values())
      cycle = 0
      while left:
        for place in range(PLACES):
          tick = PLACES * cycle + place
          if tick in row:
            if place == _I:
              waiting.append(dataclasses.replace(row[tick], kind=Kind.W))
            continue
          open_to_guests = (
            cycle <= last_f
            if place == _F
            else min(cycles_of_i) <= cycle <= max(cycles_of_i)
            if place == _I
            else cycle not in none_on
          )
          if waiting and open_to_guests:
            row[tick] = waiting.popleft()
            left -= 1
        cycle += 1

  def schedule(self, name: str) -> Schedule:
    """The schedule with these very ticks, of which those that no device uses are left out."""
    at = [sorted(row) for row in self.rows]
    order = tuple(
      tuple(row[tick] for tick in ticks) for row, ticks in zip(self.rows, at, strict=True)
    )
    return Schedule(name, self.placement, self.microbatches, order, ticks=without_gaps(at))
