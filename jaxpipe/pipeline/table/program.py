"""The tick table of a schedule: the integers that every device walks, one row a tick.

On each tick every device does at most one action, then everything that was sent arrives. For every
tick and device the table says what to do, which slot of which buffer to read and write, and where
to put what arrives. `lower.py` makes it. 1F1B on 2 devices with 3 microbatches, as columns `kind`
and `microbatch` say it:

    tick       0   1   2   3   4   5   6   7
    device 0   F0  F1  .   B0  F2  B1  .   B2
    device 1   .   F0  B0  F1  B1  F2  B2  .

The buffers are rings (`storage/rings.py`), but for the pools, which have cells of many sizes:

    buffer       filled by                                     read by
    activations  arrival of a stage's output, or embedding     F (and, if kept, R or I or B)
    gradients    arrival of an input gradient, or the head     I or B
    pools        F, R and I, with their saved values           R, I, B, W
    vocabulary   the last stage's output, on every device;     S, T, and the barrier after all S
                 S, with its results
    weights      G, with a stage's gathered weights            F, R, I, B, until X

A device to which nothing is sent on a tick writes something all the same: that costs one activation
a tick, and saves a conditional round every write. It then writes to *nowhere*, one slot more than
the ring needs, which nobody reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpipe.pipeline.table.slots import LiveRange, colour
from jaxpipe.pipeline.table.stage_collectives import StageCollectives
from jaxpipe.schedules import Action, Kind, Schedule

# The table's integers: what a device does on a tick, by the kinds that the executor runs, in
# ascending order.
IDLE = 0
CODE = {kind: code for code, kind in sorted((k.info.code, k) for k in Kind if k.info.code)}

# Names of the rings, each of which is also a column of the table.
RINGS = ("activations", "gradients", "vocabulary", "weights")


@dataclasses.dataclass(frozen=True)
class Value:
  """A saved value as the tick table sees it: which pool it needs a cell of, and for how long.

  Attributes:
    pool: number of the pool whose cells have its shape and dtype.
    made: the action that leaves it: F, R or I.
    last: the last action that reads it: R, I or W. Where one B does the work of I and W, both mean
      that B.
  """

  pool: int
  made: Kind
  last: Kind


@dataclasses.dataclass(frozen=True)
class Route:
  """All transfers over one distance round the devices, which are one `ppermute` a tick.

  Attributes:
    offset: receiver minus sender, modulo P; 0 between two stages of one device, which is a copy.
    activations: whether outputs of stages ever travel it.
    gradients: whether input gradients ever travel it.
  """

  offset: int
  activations: bool
  gradients: bool


@dataclasses.dataclass(frozen=True)
class Doing:
  """All that may happen on a tick, on any device: what has to be compiled for it.

  For a tick of the table this is exact; for a tick of a loop's body it is the union over all the
  ticks that the body stands for. It is known before anything is traced, so that a conditional or an
  exchange is compiled only where it says that devices differ, or that something is sent.

  Attributes:
    kinds: codes of the actions that devices do; `IDLE` is among them if any device does none.
    first: codes of the actions that stand at the first stage of a microbatch's path.
    last: codes of the actions that stand at the last stage of a microbatch's path.
    pairs: for every route, the (sender, receiver) pairs that carry something.
    collectives: (column, True) for every column of `StageCollectives.microbatches` whose collective
      takes place, (column, False) where it does not, and both where it takes place on some of
      several ticks only. Empty where the vocabulary is not sharded.
  """

  kinds: frozenset[int]
  first: frozenset[int]
  last: frozenset[int]
  pairs: tuple[frozenset[tuple[int, int]], ...]
  collectives: frozenset[tuple[str, bool]] = frozenset()

  @classmethod
  def any_of(cls, ticks: Sequence[Doing]) -> Doing:
    """Returns the union of what happens on several ticks, at least one."""
    return cls(
      kinds=_union(tick.kinds for tick in ticks),
      first=_union(tick.first for tick in ticks),
      last=_union(tick.last for tick in ticks),
      pairs=tuple(map(_union, zip(*(tick.pairs for tick in ticks), strict=True))),
      collectives=_union(tick.collectives for tick in ticks),
    )


@dataclasses.dataclass(frozen=True)
class Program:
  """The tick table of a schedule, and what follows from it before anything is traced.

  Attributes:
    schedule: what it runs: with the two actions of an overlapped pair one after the other, and
      without actions that take no tick.
    at: action -> (device, tick), of every action but G.
    slack: ticks that a transfer takes beyond the one that sends it, 0 or 1.
    keeps_input: whether a stage's input stays in `activations` until its R, or else its backward.
    slots: name of a ring -> slots that it needs, the largest need of any device.
    routes: the transfers, by their distance round the devices.
    doing: what happens on each tick, in order.
    collectives: the collectives over all stages; empty where the last stage holds the whole
      vocabulary.
    table: the columns by name, int32 [ticks, P] each.
      `kind`: what the device does, a value of `CODE`, or `IDLE`.
      `stage`, `chunk`, `microbatch`: of the action; S and T have a microbatch only.
      `first`, `last`: 1 at the first and at the last stage of the microbatch's path, else 0.
      `activations`, `gradients`, `vocabulary`, `weights`: the action's slot in that ring.
      `arriving_activation_r`, `arriving_gradient_r`: the slot in `activations` or in `gradients`
      for what arrives by route r at the end of the tick.
      A slot that is not there is *nowhere*, the number `slots[ring]`.
  """

  schedule: Schedule
  at: Mapping[Action, tuple[int, int]]
  slack: int
  keeps_input: bool
  slots: Mapping[str, int]
  routes: tuple[Route, ...]
  doing: tuple[Doing, ...]
  collectives: StageCollectives
  table: Mapping[str, np.ndarray]

  @property
  def ticks(self) -> int:
    """Number of ticks, which are the rows of the table."""
    return len(self.doing)

  @property
  def kinds(self) -> frozenset[Kind]:
    """The kinds of actions that occur, but for G."""
    return frozenset(action.kind for action in self.at)

  @property
  def gathers(self) -> bool:
    """Whether weights are gathered on ticks of their own."""
    return self.slots["weights"] > 0

  def length(self, ring: str) -> int:
    """Returns the slots to allocate for a ring: those that it needs, and one for *nowhere*."""
    # Weights do not arrive: G writes them, inside its own conditional.
    return self.slots[ring] + (ring != "weights")

  def cells(self, values: Sequence[Value]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Gives every saved value of every stage and microbatch a cell of its pool.

    All values of a pool are coloured together, whatever they are: what W waits for takes the cells
    of what I has read for the last time.

    Args:
      values: what the actions of one stage leave for one another.

    Returns:
      int32 [ticks, P, values], the cells of all values of the stage and microbatch of the tick's
      action, 0 for a value without one; and how many cells each pool has.
    """
    pools = [str(n) for n in range(1 + max((value.pool for value in values), default=-1))]
    slots = colour(self._live_ranges(values), pools)
    table = np.zeros((self.ticks, self.schedule.devices, len(values)), np.int32)
    for action, (d, tick) in self.at.items():
      s, m = action.stage, action.microbatch
      for n, value in enumerate(values):
        table[tick, d, n] = slots.number.get((str(value.pool), d, (s, m, n)), 0)
    return table, tuple(slots.count[pool] for pool in pools)

  def _live_ranges(self, values: Sequence[Value]) -> Iterator[LiveRange]:
    """Yields the live range of every saved value, in a buffer named by its pool's number."""
    for action, (d, tick) in self.at.items():
      if action.kind not in (Kind.F, Kind.R, Kind.I):
        continue  # other kinds leave no saved values
      s, m = action.stage, action.microbatch
      for n, value in enumerate(values):
        end = find(self.at, value.last, s, m)
        # Where only forwards run, nobody reads the value, and it needs no cell.
        if value.made is action.kind and end is not None:
          yield LiveRange(str(value.pool), d, tick, end[1], (s, m, n))


def find(
  at: Mapping[Action, tuple[int, int]], kind: Kind, stage: int, m: int
) -> tuple[int, int] | None:
  """Finds the action that does the work of a kind, for a stage and a microbatch.

  Args:
    at: action -> (device, tick).
    kind: the kind of work. Where there is no such I or W, the fused B does it.
    stage: the stage.
    m: the microbatch.

  Returns:
    (device, tick), or None where the schedule has no such action.
  """
  found = at.get(Action(stage, kind, m))
  if found is None and kind in (Kind.I, Kind.W):
    return at.get(Action(stage, Kind.B, m))
  return found


def _union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
  """Returns the union of any number of sets."""
  return frozenset().union(*sets)
