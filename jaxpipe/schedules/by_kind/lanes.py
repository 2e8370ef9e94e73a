"""The table of ticks by kind that constructions fill, and the schedule that it becomes.

In one program, devices that exchange on a tick wait for one another, so that a tick on which one
does F and another B lasts as long as B. By kind, every tick is a forward, a backward or a weight
gradient for all devices at once. Time is cut into *pairs*, each of an F tick, then an I tick, then
a W tick (or an F and a B tick), of which those are left out on which no device works:

    pair        0 . 1 . 2 . 3 . . 4 . .        1f1b's work on P=2, M=3, with a fused backward
    tick of     F B F B F B F B   F B
    device 0    0   1   2 0   1     2
    device 1        0 0 1 1 2 2

A device without work on a tick may do a weight gradient there that has waited, as a *guest*: it is
no longer than what the others do where W <= F and I.
"""

import collections
import dataclasses
from collections.abc import Container, Sequence

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule

# The places of a pair: its F tick, its I or B tick, its W tick.
PLACES = 3
_F, _I, _W = range(PLACES)


@dataclasses.dataclass
class Lanes:
  """Which action each device does on which tick; a tick is `PLACES` times its pair, plus its place.

  Attributes:
    placement: which device holds which stage.
    microbatches: number of microbatches, M.
    rows: for each of P devices, tick -> action.
  """

  placement: Placement
  microbatches: int
  rows: list[dict[int, Action]]

  @classmethod
  def empty(cls, placement: Placement, microbatches: int) -> "Lanes":
    """A table without actions."""
    return cls(placement, microbatches, [{} for _ in range(placement.devices)])

  def forward(self, device: int, pair: int, stage: int, microbatch: int) -> None:
    """Puts an F on the F tick of a pair."""
    self.rows[device][PLACES * pair + _F] = Action(stage, Kind.F, microbatch)

  def backward(self, device: int, pair: int, kind: Kind, stage: int, microbatch: int) -> None:
    """Puts a B or an I on the second tick of a pair."""
    self.rows[device][PLACES * pair + _I] = Action(stage, kind, microbatch)

  def weight_grads_at_once(self) -> None:
    """Puts every W on the W tick of its I's pair: a fused backward in two actions."""
    for row in self.rows:
      for tick, action in list(row.items()):
        if action.kind is Kind.I:
          row[tick - _I + _W] = dataclasses.replace(action, kind=Kind.W)

  def weight_grads_late(self, none_on: Container[int]) -> None:
    """Puts every W on the first tick after its I that is for W, or where its device idles.

    A device idles on F ticks up to the last F of all, and on I ticks from the first I to the last.

    Args:
      none_on: pairs without a W tick.
    """
    ticks = [(tick, action.kind) for row in self.rows for tick, action in row.items()]
    last_f = max(tick for tick, kind in ticks if kind is Kind.F) // PLACES
    pairs_of_i = [tick // PLACES for tick, kind in ticks if kind is Kind.I]
    for row in self.rows:
      waiting: collections.deque[Action] = collections.deque()
      left = sum(action.kind is Kind.I for action in row.values())
      pair = 0
      while left:
        for place in range(PLACES):
          tick = PLACES * pair + place
          if tick in row:
            if place == _I:
              waiting.append(dataclasses.replace(row[tick], kind=Kind.W))
            continue
          open_to_guests = (
            pair <= last_f
            if place == _F
            else min(pairs_of_i) <= pair <= max(pairs_of_i)
            if place == _I
            else pair not in none_on
          )
          if waiting and open_to_guests:
            row[tick] = waiting.popleft()
            left -= 1
        pair += 1

  def schedule(self, name: str) -> Schedule:
    """The schedule with these very ticks, of which those that no device uses are left out."""
    used = sorted({tick for row in self.rows for tick in row})
    number = {tick: n for n, tick in enumerate(used)}
    rows: Sequence[list[int]] = [sorted(row) for row in self.rows]
    return Schedule(
      name,
      self.placement,
      self.microbatches,
      tuple(tuple(row[tick] for tick in at) for row, at in zip(self.rows, rows, strict=True)),
      ticks=tuple(tuple(number[tick] for tick in at) for at in rows),
    )
