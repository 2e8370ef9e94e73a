"""The best of many schedules in a V, under one memory limit.

A drawn pattern is best where every pass takes one tick. Elsewhere nobody knows the best, but it is
cheap to try: patterns with W where it happens to fit, blocks at other paces, greedy schedules with
other priorities. All are simulated, and local search starts from the best few.

  patterns of the family -- blocks of other paces -- greedy --> the best few -- local search --> one

The number of trials shrinks with size, so that the time grows no faster than the schedule.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from jaxpipe.schedules.actions import Kind, Order, ScheduleError
from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.bounds import lower_bound
from jaxpipe.schedules.planning.building_block import V_PERIOD, Block, repeat, v_blocks, v_ticks
from jaxpipe.schedules.planning.improve import improve
from jaxpipe.schedules.planning.list_schedule import Policy, all_work, list_schedule
from jaxpipe.schedules.planning.problem import Objective, Problem, pose
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate

# Actions in all trials together, and moves of local search times actions: a second or so each.
_TRIALS = 100_000
_MOVES = 1_000_000
# Further moves find little.
_MOST_TRIALS = 150
_MOST_MOVES = 2500
_STARTS = 4
_BLOCKS = 24
# Seeds of local search for each start.
_SEEDS = 2
# Searches in a row that find nothing better, after which no more are tried.
_VAIN = 4
# Of blocks: ticks lost at the turn, room for W in a gap, ticks lost at the loss, share of the
# memory that the pace is for, ticks down for each tick up.
_GRID = ((0, 1.5), (0, 1), (0, 2, 1, 3), (1, 0.85, 0.7), (2, 1, 1.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What to search for.

  Attributes:
    name: of the schedule.
    placement: a V.
    microbatches: number of microbatches, M.
    costs: durations.
    memory: what F, I and W change.
    limit: most memory of each device.
    objective: what comes first; the other one breaks ties.
  """

  name: str
  placement: Placement
  microbatches: int
  costs: Costs
  memory: Memory
  limit: tuple[float, ...]
  objective: Objective


# Makes an order on demand; it may find that it does not fit, and raise ScheduleError.
Trial = Callable[[], Order]
_Value = tuple[float, float]


def best_v(task: Task, patterns: Sequence[Trial]) -> Schedule:
  """Searches.

  Args:
    task: what for.
    patterns: what the family would do; the first ones are tried whatever the size.

  Returns:
    The best schedule found: no pattern that was tried is better.

  Raises:
    ValueError: the limit is too low for a single microbatch.
  """
  tried = _tried(task, patterns)
  reference = tried[0][0]
  found = sorted(dict(tried).items(), key=lambda item: _key(item[0], reference))
  best, vain = found[0], 0
  for start, objective, seed in _starts(task, found):
    # What is proven to be best needs no search.
    if vain == _VAIN or _is_best(task, best[0]):
      break
    item = _improved(task, start, objective, seed)
    better = _key(item[0], reference) < _key(best[0], reference)
    best, vain = (item, 0) if better else (best, vain + 1)
  return best[1]


def _starts(
  task: Task, found: Sequence[tuple[_Value, Schedule]]
) -> Iterator[tuple[Schedule, Objective, int]]:
  """Where local search starts, for what, and with which seed."""
  # A link that is busy is more than local search plans with.
  if _moves(task) < _MOST_MOVES // 10 or task.costs.hop_occupies_link:
    return
  # A shorter span may take a longer step, so both are looked at; the reverse is rare.
  objectives = _objectives(task) if task.objective == "span" else _objectives(task)[:1]
  for seed, objective in itertools.product(range(_SEEDS), objectives):
    for _, schedule in found[:_STARTS]:
      yield schedule, objective, seed


def _moves(task: Task) -> int:
  return min(_MOST_MOVES, _MOVES // _actions(task))


def _key(value: _Value, reference: _Value) -> tuple[bool, float, float]:
  """What is smallest for the best: no gain is worth a loss against the first pattern."""
  return value[1] > reference[1], *value


def _actions(task: Task) -> int:
  return 3 * task.placement.stages * task.microbatches


def _tried(task: Task, patterns: Sequence[Trial]) -> list[tuple[_Value, Schedule]]:
  """Schedules with their values, in the order in which they were tried."""
  count = max(1, min(_MOST_TRIALS, _TRIALS // _actions(task)))
  found: list[tuple[_Value, Schedule]] = []
  # Greedy ones always fit, so a search that runs out of patterns goes on until something does.
  for i, trial in enumerate(itertools.chain(patterns, _greedy(task), _paces(task))):
    if found and i >= count:
      break
    try:
      schedule = Schedule(task.name, task.placement, task.microbatches, trial())
    except ScheduleError:
      continue
    # The only one needs no comparison, and large ones take long to simulate.
    found.append((_value(task, schedule) if count > 1 else (0, 0), schedule))
    if len(found) == 1 < count and _is_best(task, found[0][0]):
      break
  return found


def _value(task: Task, schedule: Schedule) -> _Value:
  timeline = simulate(schedule, task.costs, task.memory)
  if task.objective == "span":
    return timeline.span, timeline.makespan
  return timeline.makespan, timeline.span


def _is_best(task: Task, value: _Value) -> bool:
  """Whether both objectives are proven to be as short as they can be."""
  if task.costs.hop_occupies_link:
    return False
  for objective, found in zip(_objectives(task), value, strict=True):
    problem = _problem(task, objective)
    if found * problem.scale > lower_bound(problem):
      return False
  return True


def _objectives(task: Task) -> tuple[Objective, Objective]:
  return ("span", "makespan") if task.objective == "span" else ("makespan", "span")


def _problem(task: Task, objective: Objective) -> Problem:
  return pose(
    placement=task.placement,
    microbatches=task.microbatches,
    costs=task.costs,
    memory=task.memory,
    memory_limit=None if math.inf in task.limit else task.limit,
    objective=objective,
  )


def _improved(
  task: Task, schedule: Schedule, objective: Objective, seed: int
) -> tuple[_Value, Schedule]:
  problem = _problem(task, objective)
  words, _ = improve(
    problem,
    problem.words(schedule),
    moves=_moves(task),
    bound=lower_bound(problem),
    seed=seed,
  )
  schedule = problem.schedule(words, task.name)
  return _value(task, schedule), schedule


def _paces(task: Task) -> Iterator[Trial]:
  """Blocks whose passes follow each other as fast as the memory that there is suggests."""
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
  """Blocks that were made for the limit."""
  # The formula leaves the ends of a step out of account, where W may wait; one more may do.
  blocks = v_blocks(task.placement.devices, _most(task) + 1)
  return [block_trial(task, block) for block in blocks[:_BLOCKS]]


def block_trial(task: Task, block: Block, gap: float = 0) -> Trial:
  """The trial that repeats a block."""
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
  """Chunks that fit into every device, as far as they can be of use."""
  changes = task.memory[0]
  chunk = max(changes) if isinstance(changes, Sequence) else changes
  useful = 2 * min(task.placement.devices, task.microbatches)
  return min(useful, min(task.limit) / chunk) if chunk else useful


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ticks:
  """The durations of F, I and hops, in sixths of what a device works for one microbatch."""

  forward: float
  input_grad: float
  hop: float

  @classmethod
  def of(cls, task: Task) -> "_Ticks":
    durations = task.costs.durations(task.placement.stages)
    means = [sum(durations[k]) / len(durations[k]) for k in (Kind.F, Kind.I, Kind.W)]
    tick = sum(means) / 3 or 1
    return cls(forward=means[0] / tick, input_grad=means[1] / tick, hop=task.costs.hop / tick)

  def block(self, P: int, down: float, up: float, turn: float, loss: float) -> Block:
    """A block whose ticks leave time for passes and hops, where there is a choice."""
    forward, input_grad = self.forward + self.hop, self.input_grad + self.hop
    return v_ticks(
      P,
      (max(down, forward), max(up, forward)),
      (max(down, input_grad), max(up, input_grad)),
      (self.forward + turn, self.forward + loss, self.input_grad + turn),
    )


def _greedy(task: Task) -> Iterator[Trial]:
  """List schedules that prefer forwards or gradients, or the chunk that is nearer to the end."""
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
      if kind is Kind.W:
        return math.inf
      group = classes[2 * (kind is Kind.I) + (stage >= P)]
      return group * apart + microbatch * S - stage

    policy = Policy(urgency=urgency, in_flight=in_flight, gap=gap, patience=patience * shortest)
    yield _list_trial(task, policy)


def _list_trial(task: Task, policy: Policy) -> Trial:
  work = all_work(task.placement, task.microbatches)
  return lambda: list_schedule(
    task.placement, work, policy, costs=task.costs, memory=task.memory, limit=task.limit
  )
