"""The integer table that the executor walks, one row a tick.

On each tick every device does at most one action, then everything that was sent arrives. The table
says, for every tick and device, what to do, which slot of which buffer to read and write, and where
to put what arrives. `lower` makes it.

    buffer       filled by                                   read by
    activations  arrival of the output before, or embedding  F (and, where F keeps it, R or I or B)
    gradients    the head, or arrival of dx                  I or B
    pools        F, R, I: the saved values, cell by cell     R, I, B, W
    vocabulary   the last stage's output, on every device    S, T, and the end of all S
    weights      G: a stage's weights, gathered              F, R, I, B, until X
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxpipe.pipeline.table.meetings import Meetings
from jaxpipe.pipeline.table.slots import Stay, colour
from jaxpipe.schedules import Action, Kind, Schedule

# What a device does on a tick, as the table's integers.
IDLE = 0
CODE = {Kind(letter): code for code, letter in enumerate("FRBIWSTG", 1)}

RINGS = ("activations", "gradients", "vocabulary", "weights")


@dataclasses.dataclass(frozen=True)
class Value:
  """A saved value, as the program sees it.

  Attributes:
    pool: number of the pool that has cells of its size.
    made: the action that leaves it: F, R or I.
    last: the last that reads it: R, I or W; where one B does the work of I and W, it is that B.
  """

  pool: int
  made: Kind
  last: Kind


@dataclasses.dataclass(frozen=True)
class Route:
  """All transfers over one distance round the devices.

  Attributes:
    offset: receiver minus sender, modulo P; 0 is a copy within the device.
    activations: whether outputs ever travel it.
    gradients: whether input gradients ever do.
  """

  offset: int
  activations: bool
  gradients: bool


@dataclasses.dataclass(frozen=True)
class Doing:
  """What happens on one tick, or on any of several, over all devices.

  Attributes:
    kinds: codes of what devices do, `IDLE` included.
    first, last: codes of what they do at the first and at the last stage of a microbatch's path.
    pairs: for every route, the (sender, receiver) pairs that carry something.
    meetings: (column, whether) of every meeting; both, where it is on some ticks only.
  """

  kinds: frozenset[int]
  first: frozenset[int]
  last: frozenset[int]
  pairs: tuple[frozenset[tuple[int, int]], ...]
  meetings: frozenset[tuple[str, bool]] = frozenset()

  @classmethod
  def any_of(cls, ticks: Sequence[Doing]) -> Doing:
    """All that happens on any of the ticks."""
    union = lambda sets: frozenset().union(*sets)  # noqa: E731
    return cls(
      kinds=union(tick.kinds for tick in ticks),
      first=union(tick.first for tick in ticks),
      last=union(tick.last for tick in ticks),
      pairs=tuple(map(union, zip(*(tick.pairs for tick in ticks), strict=True))),
      meetings=union(tick.meetings for tick in ticks),
    )


@dataclasses.dataclass(frozen=True)
class Program:
  """The tick table of a schedule.

  Attributes:
    schedule: what it runs.
    at: device and tick of every action but gathers of weights.
    slack: ticks that a transfer takes beyond the one that sends it.
    keeps_input: whether a stage's input stays in `activations` until its backward.
    slots: length of each ring, the largest need of any device.
    routes: who sends to whom.
    doing: what happens on each tick.
    meetings: where all devices meet; none where the last stage holds the whole vocabulary.
    table: int32 [ticks, P] each: `kind`, `chunk`, `stage`, `microbatch`; `first` and `last`, 1 at
      an end of the microbatch's path; the slot in each ring, under the ring's name; and for route
      r, `arriving_activation_r` and `arriving_gradient_r`, where `slots[ring]` itself, one past the
      end, stands for "nowhere".
  """

  schedule: Schedule
  at: Mapping[Action, tuple[int, int]]
  slack: int
  keeps_input: bool
  slots: Mapping[str, int]
  routes: tuple[Route, ...]
  doing: tuple[Doing, ...]
  meetings: Meetings
  table: Mapping[str, np.ndarray]

  @property
  def ticks(self) -> int:
    """Number of rows."""
    return len(self.doing)

  @property
  def kinds(self) -> frozenset[Kind]:
    """The kinds that occur."""
    return frozenset(action.kind for action in self.at)

  @property
  def gathers(self) -> bool:
    """Whether weights are gathered on ticks of their own."""
    return self.slots["weights"] > 0

  def length(self, ring: str) -> int:
    """Slots to allocate: one more than are used, which stands for "nowhere".

    What arrives on a tick that nobody sends is written there, in place of a conditional round
    every write. Weights do not arrive: G writes them, inside its branch.
    """
    return self.slots[ring] + (ring != "weights")

  def cells(self, values: Sequence[Value]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Gives every saved value of every stage and microbatch a cell of its pool.

    Values of one size share a pool whatever they are: what W waits for takes the cells of what I
    has consumed.

    Args:
      values: what the actions of one stage leave for one another.

    Returns:
      int32 [ticks, P, values], the cells that the tick's action reads and writes; and how many
      cells each pool has.
    """
    stays = list(self._stays_of(values))
    pools = [str(n) for n in range(1 + max((value.pool for value in values), default=-1))]
    cell, lengths = colour(stays, pools)
    table = np.zeros((self.ticks, self.schedule.devices, len(values)), np.int32)
    for action, (d, tick) in self.at.items():
      s, m = action.stage, action.microbatch
      for n, value in enumerate(values):
        table[tick, d, n] = cell.get((str(value.pool), d, (s, m, n)), 0)
    return table, tuple(lengths[pool] for pool in pools)

  def _stays_of(self, values: Sequence[Value]) -> Iterator[Stay]:
    for action, (d, tick) in self.at.items():
      if action.kind not in (Kind.F, Kind.R, Kind.I):
        continue
      s, m = action.stage, action.microbatch
      for n, value in enumerate(values):
        end = find(self.at, value.last, s, m)
        if value.made is action.kind and end is not None:
          yield Stay(str(value.pool), d, tick, end[1], (s, m, n))


def find(
  at: Mapping[Action, tuple[int, int]], kind: Kind, stage: int, m: int
) -> tuple[int, int] | None:
  """Device and tick of an action, fused or not; None where the schedule has no such action."""
  found = at.get(Action(stage, kind, m))
  if found is None and kind in (Kind.I, Kind.W):
    return at.get(Action(stage, Kind.B, m))
  return found
