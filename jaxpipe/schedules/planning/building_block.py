"""Building blocks: one microbatch's timetable, repeated, squeezed and reordered.

Controllable Memory (Qi et al., 2024, arXiv:2405.15362): draw when a single microbatch runs all of
its passes, so that the drawing, shifted by its period again and again, never asks a device for two
things at once. Then the lifespans in the drawing decide the memory: a chunk that lives for L ticks
of a period of T is held ceil(L / T) times, so a device holds at most

  sum over its chunks of ceil(lifespan / period).

P=3 in a V, period 6: V-Min's block and its first repetition, the second chunk in small letters:

  device 0 | F0             f0 F1    i0 w0    f1    I0 i1 w1 W0 ..
  device 1 |    F0       f0       F1    i0 f1 w0 I0    W0 i1    w1 I1 ..
  device 2 |       F0 f0             F1 f1 i0 I0 w0 W0       i1 I1 w1 ..

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

from jaxpipe.schedules.actions import Order
from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.list_schedule import Policy, all_work, list_schedule

# A device with two chunks has six passes of one tick for every microbatch.
V_PERIOD = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """The ticks at which microbatch 0 runs; microbatch m does the same m periods later.

  Attributes:
    period: ticks between two microbatches.
    forward: S ticks at which F starts, by stage.
    input_grad: S ticks at which I starts, by stage.
  """

  period: float
  forward: tuple[float, ...]
  input_grad: tuple[float, ...]

  def weight_grad(self, placement: Placement) -> tuple[int, ...] | None:
    """Returns the first free tick for every W after its I, by stage.

    Ticks count as equal if they are a whole number of periods apart.

    Args:
      placement: the devices on which passes must not collide.

    Returns:
      S ticks, or None where two passes of a device collide.
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
    """Returns the most chunks that a device holds, by the formula; None where passes collide."""
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
  """Makes a block into lists of actions: repeats, squeezes and reorders it.

  Args:
    placement: where the stages live.
    block: the order of F and I; its ticks need not fit, for only their order is used.
    microbatches: number of microbatches, M.
    costs: durations, by which W finds its gaps.
    memory: changes of the memory that a device holds by F, I and W.
    limit: most memory that a device may hold, one number or one per device; None for no limit.
    gap: the share of a W that must fit into a gap.

  Returns:
    Each device's list.

  Raises:
    ScheduleError: the block's order needs more memory than the limit.
  """
  T, M = block.period, microbatches
  forward, input_grad = block.forward, block.input_grad
  first = [min(block.input_grad[s] for s in row) for row in placement.table]
  last = [max(block.forward[s] for s in row) + (M - 1) * T for row in placement.table]
  # Bounds on microbatches, by stage, computed once: they are looked up several times per action.
  homes = [placement.device(s) for s in range(placement.stages)]
  filling = [(first[d] - block.forward[s]) / T for s, d in enumerate(homes)]
  draining = [(last[d] - block.input_grad[s]) / T for s, d in enumerate(homes)]

  # Kinds are compared by identity: looking one up in a dict is several times slower.
  def rank(kind: Kind, stage: int, microbatch: int) -> float:
    """Puts F before all else while the pipeline fills, and I after all F while it drains."""
    if kind is Kind.F:
      # [3] and [1]
      return -math.inf if microbatch < filling[stage] else forward[stage] + microbatch * T
    return math.inf if microbatch > draining[stage] else input_grad[stage] + microbatch * T

  def urgency(kind: Kind, stage: int, microbatch: int) -> float:
    """Returns the tick of F or I in the repeated block; W only fills gaps."""
    if kind is Kind.W:
      return math.inf
    return (forward if kind is Kind.F else input_grad)[stage] + microbatch * T

  policy = Policy(urgency=urgency, rank=rank, gap=gap)
  work = all_work(placement, M)
  return list_schedule(placement, work, policy, costs=costs, memory=memory, limit=limit)  # [2]


def v_ticks(
  P: int, forward: tuple[float, float], input_grad: tuple[float, float], turns: Sequence[float]
) -> Block:
  """Makes a block in a V whose passes go at an even pace.

  Args:
    P: number of devices.
    forward: ticks from one device to the next for F, on the way down and on the way up.
    input_grad: ticks from one device to the next for I, which begins where F ends: on the way down
      the second chunk and on the way up the first.
    turns: ticks from F to F on the last device, from F to I on the first, from I to I on the last.
  """
  ahead = [0, *(forward[0],) * (P - 1), turns[0], *(forward[1],) * (P - 1)]
  back = [turns[1], *(input_grad[0],) * (P - 1), turns[2], *(input_grad[1],) * (P - 1)]
  ticks = list(itertools.accumulate([*ahead, *back]))
  S = 2 * P
  return Block(period=V_PERIOD, forward=tuple(ticks[:S]), input_grad=tuple(ticks[S:][::-1]))


def v_min_block(P: int) -> Block:
  """Returns the paper's block for the least memory: as fast as passes can follow each other."""
  # Chunks of one device would collide where 3 divides P.
  return v_ticks(P, (1, 1), (1, 1), (1, 3 if P % 3 == 0 else 1, 1))


def v_half_block(P: int) -> Block:
  """Returns the paper's block for half of 1F1B's memory: down the V at half the pace."""
  return v_ticks(P, (2, 1), (2, 1), (1, 4 if P % 2 == 0 else 1, 2))


def v_blocks(P: int, limit: float) -> list[Block]:
  """Returns the blocks in a V that keep to a memory limit, the most promising first.

  A microbatch that takes its time is in flight more often, which is what hides the turns of the
  V at both ends of a step; so those that hold most come first, and of equal ones those that take
  least time.

  Args:
    P: number of devices.
    limit: most chunks that a device may hold.

  Returns:
    All evenly paced blocks whose `peak` is within the limit; there may be none.
  """
  return [block for peak, _, block in _v_blocks(P) if peak <= limit]


@functools.cache
def _v_blocks(P: int) -> list[tuple[int, float, Block]]:
  """Returns all blocks in a V with their peaks and durations: largest peak first, then shortest."""
  found = []
  placement = Placement.v(P)
  # Longer turns repeat the residues and only cost time; slower paces hold more than 2P chunks.
  for turns in itertools.product(range(1, V_PERIOD + 1), repeat=3):
    for paces in itertools.product((1, 2, 3, 4), repeat=4):
      if _collides(P, paces, turns):
        continue
      block = v_ticks(P, (paces[0], paces[1]), (paces[2], paces[3]), turns)
      peak = block.peak(placement)
      assert peak is not None
      found.append((peak, block.input_grad[0], block))
  return sorted(found, key=lambda item: (-item[0], item[1]))


def _collides(P: int, paces: Sequence[int], turns: Sequence[int]) -> bool:
  """Whether two of the four F and I of a device share a tick of the period, on any device."""
  a, b, c, d = paces
  up = a * (P - 1) + turns[0] + b * (P - 1)
  down = up + turns[1]
  home = down + c * (P - 1) + turns[2] + d * (P - 1)
  # Residues repeat from device to device after one period.
  return any(
    len({x % V_PERIOD for x in (a * i, up - b * i, down + c * i, home - d * i)}) < 4
    for i in range(min(P, V_PERIOD))
  )
