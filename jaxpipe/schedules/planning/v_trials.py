"""Generates schedules in a V that are worth a trial: blocks at many paces, and greedy schedules.

A trial is only made into an order if there is time for it (see `v_search`), so they come in the
order of promise: blocks that keep to the limit by their formula, greedy schedules, which always
fit, and blocks whose ticks leave time for unequal passes and hops, where the formula says little.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from jaxpipe.schedules.actions import Order
from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.building_block import V_PERIOD, Block, repeat, v_blocks, v_ticks
from jaxpipe.schedules.planning.list_schedule import Policy, all_work, list_schedule
from jaxpipe.schedules.solver.problem import Objective

_BLOCKS = 24
# Values to try for blocks: ticks lost at the turn, share of a W that must fit into a gap, ticks
# lost at the loss, share of the memory that the pace is for, ticks down for each tick up.
_GRID = ((0, 1.5), (0, 1), (0, 2, 1, 3), (1, 0.85, 0.7), (2, 1, 1.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A request for a schedule in a V.

  Attributes:
    name: name of the schedule.
    placement: a V of P devices.
    microbatches: number of microbatches, M.
    costs: durations.
    memory: changes of the memory that a device holds by F, I and W.
    limit: P limits, the most memory that each device may hold.
    objective: `makespan` or `span`, whichever is minimized first; the other one breaks ties.
    effort: factor on the usual number of moves of local search.
  """

  name: str
  placement: Placement
  microbatches: int
  costs: Costs
  memory: Memory
  limit: tuple[float, ...]
  objective: Objective
  effort: int = 1


# Makes an order on demand; it may find that it does not fit, and raise ScheduleError.
Trial = Callable[[], Order]


def paces(task: Task) -> Iterator[Trial]:
  """Yields blocks whose passes follow each other as fast as the memory limit suggests."""
  P = task.placement.devices
  # A chunk of the average lifespan is held lifespan / period times; see `building_block`.
  round_trip = V_PERIOD * _most(task) / P
  ticks = _Ticks.of(task)
  # Fewer trials see the first values of the last ones.
  for turn, gap, loss, share, ratio in itertools.product(*_GRID):
    pace = max(4, round_trip * share) / 2
    up = max(1, pace / (1 + ratio))
    yield block_trial(task, ticks.block(P, max(1, pace - up), up, turn, loss), gap)


def block_trials(task: Task) -> list[Trial]:
  """Returns trials of the blocks that keep to the limit by their formula, or nearly."""
  # The formula leaves the ends of a step out of account, where W may wait; one more may do.
  blocks = v_blocks(task.placement.devices, _most(task) + 1)
  return [block_trial(task, block) for block in blocks[:_BLOCKS]]


def block_trial(task: Task, block: Block, gap: float = 0) -> Trial:
  """Returns the trial that repeats a block; `gap` is the share of a W that must fit into a gap."""
  return lambda: repeat(
    task.placement,
    block,
    task.microbatches,
    costs=task.costs,
    memory=task.memory,
    limit=task.limit,
    gap=gap,
  )


def _most(task: Task) -> float:
  """Returns how many chunks fit into every device, at most as many as can be of use."""
  changes = task.memory[0]
  chunk = max(changes) if isinstance(changes, Sequence) else changes
  useful = 2 * min(task.placement.devices, task.microbatches)
  return min(useful, min(task.limit) / chunk) if chunk else useful


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ticks:
  """Durations in ticks; a device works six ticks for one microbatch.

  Attributes:
    forward: mean time of F.
    input_grad: mean time of I.
    hop: latency between devices.
  """

  forward: float
  input_grad: float
  hop: float

  @classmethod
  def of(cls, task: Task) -> "_Ticks":
    """Converts the means of a task's durations."""
    durations = task.costs.durations(task.placement.stages)
    means = [sum(durations[k]) / len(durations[k]) for k in (Kind.F, Kind.I, Kind.W)]
    tick = sum(means) / 3 or 1
    return cls(forward=means[0] / tick, input_grad=means[1] / tick, hop=task.costs.hop / tick)

  def block(self, P: int, down: float, up: float, turn: float, loss: float) -> Block:
    """Returns a block that is no faster than passes and hops allow."""
    forward, input_grad = self.forward + self.hop, self.input_grad + self.hop
    return v_ticks(
      P,
      (max(down, forward), max(up, forward)),
      (max(down, input_grad), max(up, input_grad)),
      (self.forward + turn, self.forward + loss, self.input_grad + turn),
    )


def greedy(task: Task) -> Iterator[Trial]:
  """Yields list schedules that prefer forwards or gradients, or the chunk nearer to the end."""
  P, M = task.placement.devices, task.microbatches
  S = task.placement.stages
  # Deeper stages first within a microbatch; classes far apart.
  apart = (M + 1) * S
  orders = {
    "gradients": (1, 1, 0, 0),
    "forwards": (0, 0, 1, 1),
    "late forwards": (2, 0, 1, 1),
    "late gradients": (3, 2, 0, 1),
  }
  shortest = min(min(times) for times in task.costs.durations(S).values())
  chunks = max(1, int(_most(task)) - 1)
  caps = (None, [max(1, min(chunks, S - s)) for s in range(S)])
  options = itertools.product((0, 0.5), caps, (0, 1), orders.values())
  for patience, in_flight, gap, classes in options:
    # Bound now: the loop has moved on when the trial runs.
    def urgency(kind: Kind, stage: int, microbatch: int, classes: Sequence[int] = classes) -> float:
      """Ranks by class of kind and chunk, then by microbatch, then deeper stages first."""
      if kind is Kind.W:
        return math.inf
      group = classes[2 * (kind is Kind.I) + (stage >= P)]
      return group * apart + microbatch * S - stage

    policy = Policy(urgency=urgency, in_flight=in_flight, gap=gap, patience=patience * shortest)
    yield _list_trial(task, policy)


def _list_trial(task: Task, policy: Policy) -> Trial:
  """Returns the trial that schedules all work by a policy."""
  work = all_work(task.placement, task.microbatches)
  return lambda: list_schedule(
    task.placement, work, policy, costs=task.costs, memory=task.memory, limit=task.limit
  )
