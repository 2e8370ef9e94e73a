"""Building blocks: one microbatch's timetable, repeated, squeezed and reordered.

Controllable Memory (Qi et al., 2024, arXiv:2405.15362): draw when a single microbatch runs all of
its passes, so that the drawing, shifted by its period again and again, never asks a device for two
things at once. Then the lifespans in the drawing decide the memory: a chunk that lives for L ticks
of a period of T is held ceil(L / T) times, so a device holds at most

  sum over its chunks of ceil(lifespan / period).

P=3 in a V, period 6, microbatch 0 in full and where 1 begins (V-Min's block, chunks F f):

  BLOCK

  [1] repeat: everything of microbatch m runs m periods later
  [2] squeeze: only the order is kept; every device starts what is next as soon as it can
  [3] reorder: at both ends the pattern is not full, and another order is shorter: up to a device's
      first I its Fs, and after its last F its Is, run as they become possible. A W waits for a gap,
      or until memory is short

The paper's reordering is described by its aims only; [3] is how it is done here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from jaxpipe.schedules.actions import Kind, Order
from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.list_schedule import Policy, all_work, list_schedule
from jaxpipe.schedules.placement import Placement

# A device with two chunks has six passes of one tick for every microbatch.
V_PERIOD = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """When microbatch 0 runs what, in ticks; microbatch m does the same m periods later.

  Attributes:
    period: ticks between two microbatches.
    forward: tick of F, by stage.
    input_grad: tick of I, by stage.
  """

  period: float
  forward: tuple[float, ...]
  input_grad: tuple[float, ...]

  def weight_grad(self, placement: Placement) -> tuple[int, ...] | None:
    """The first free tick for every W after its I, or None where two passes of a device collide.

    Ticks count as equal if they are a whole number of periods apart.
    """
    found = [0] * placement.stages
    for row in placement.table:
      taken = {t[s] % self.period for s in row for t in (self.forward, self.input_grad)}
      if len(taken) < 2 * len(row) or 3 * len(row) > self.period:
        return None
      for s in sorted(row, key=self.input_grad.__getitem__):
        after = itertools.count(int(self.input_grad[s]) + 1)
        found[s] = next(t for t in after if t % self.period not in taken)
        taken.add(found[s] % self.period)
    return tuple(found)

  def peak(self, placement: Placement) -> int | None:
    """Most chunks that a device holds, by the formula; None where passes collide."""
    weight_grad = self.weight_grad(placement)
    if weight_grad is None:
      return None
    return max(
      sum(math.ceil((weight_grad[s] + 1 - self.forward[s]) / self.period) for s in row)
      for row in placement.table
    )


def repeat(
  placement: Placement,
  block: Block,
  microbatches: int,
  *,
  costs: Costs | None = None,
  memory: Memory = (1, 0, -1),
  limit: float | Sequence[float] | None = None,
  gap: float = 0,
) -> Order:
  """Repeats, squeezes and reorders a block.

  Args:
    placement: where the stages live.
    block: the order of F and I; its ticks need not fit, for only their order is used.
    microbatches: number of microbatches, M.
    costs: durations, by which W finds its gaps.
    memory: what F, I and W change.
    limit: most memory that a device may hold, one number or one per device; None for no limit.
    gap: the share of a W that a gap must have room for.

  Returns:
    Each device's list.

  Raises:
    ScheduleError: the block's order needs more memory than the limit.
  """
  T, M = block.period, microbatches
  ticks = {Kind.F: block.forward, Kind.I: block.input_grad}
  first = [min(block.input_grad[s] for s in row) for row in placement.table]
  last = [max(block.forward[s] for s in row) + (M - 1) * T for row in placement.table]
  # By stage, and as bounds on microbatches: this is asked several times for every action.
  homes = [placement.device(s) for s in range(placement.stages)]
  filling = [(first[d] - block.forward[s]) / T for s, d in enumerate(homes)]
  draining = [(last[d] - block.input_grad[s]) / T for s, d in enumerate(homes)]

  def rank(kind: Kind, stage: int, microbatch: int) -> float:
    if kind is Kind.F:
      if microbatch < filling[stage]:
        return -math.inf  # [3]
    elif microbatch > draining[stage]:
      return math.inf
    return ticks[kind][stage] + microbatch * T  # [1]

  def urgency(kind: Kind, stage: int, microbatch: int) -> float:
    return math.inf if kind is Kind.W else ticks[kind][stage] + microbatch * T

  policy = Policy(urgency=urgency, rank=rank, gap=gap)
  work = all_work(placement, M)
  return list_schedule(placement, work, policy, costs=costs, memory=memory, limit=limit)  # [2]


def v_ticks(P: int, down: float, up: float, turn: float, loss: float, back: float) -> Block:
  """A block in a V whose passes go at an even pace.

  Args:
    P: number of devices.
    down: ticks from one device to the next for what goes down, F of the first chunk and I of the
      second.
    up: the same for what comes back up.
    turn: ticks from F to F on the last device.
    loss: ticks from F to I of the last stage.
    back: ticks from I to I on the last device.
  """
  fall = [down * i for i in range(P)]
  rise = [fall[-1] + turn + up * i for i in range(P)]
  forward = (*fall, *rise)
  fall = [rise[-1] + loss + down * i for i in range(P)]
  rise = [fall[-1] + back + up * i for i in range(P)]
  input_grad = (*fall, *rise)[::-1]
  return Block(period=V_PERIOD, forward=forward, input_grad=input_grad)


def v_min_block(P: int) -> Block:
  """The paper's block for the least memory: as fast as passes can follow each other."""
  # Chunks of one device would collide where 3 divides P.
  return v_ticks(P, 1, 1, turn=1, loss=3 if P % 3 == 0 else 1, back=1)


def v_half_block(P: int) -> Block:
  """The paper's block for half of 1F1B's memory: down the V at half the pace."""
  return v_ticks(P, 2, 1, turn=1, loss=4 if P % 2 == 0 else 1, back=2)


@functools.cache
def v_block(P: int, limit: int) -> Block:
  """The block in a V that makes the most of a memory limit.

  A microbatch that takes its time is in flight more often, which is what hides the turns of the
  V at both ends of a step; so of all evenly paced blocks the one that holds most is taken, and of
  equal ones the one that takes least time.

  Args:
    P: number of devices.
    limit: most chunks that a device may hold.

  Returns:
    The block.

  Raises:
    ValueError: no evenly paced block holds so little.
  """
  lowest = math.inf
  best: tuple[int, float, Block] | None = None
  for block in _v_blocks(P):
    peak = block.peak(Placement.v(P))
    if peak is None:
      continue
    lowest = min(lowest, peak)
    if peak <= limit and (best is None or (-peak, block.input_grad[0]) < best[:2]):
      best = (-peak, block.input_grad[0], block)
  if best is None:
    raise ValueError(
      f"no V building block for {P} devices holds only {limit} chunks; use a limit of {lowest}"
    )
  return best[2]


def _v_blocks(P: int) -> list[Block]:
  # Beyond six ticks the residues repeat: longer turns only cost time.
  turns = range(1, V_PERIOD + 1)
  return [
    v_ticks(P, down, up, turn, loss, back)
    for down in (1, 2, 3, 4)
    for up in (1, 2, 3, 4)
    for turn in turns
    for loss in turns
    for back in turns
  ]
