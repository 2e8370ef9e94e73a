"""Searches for the best of many schedules in a V under a memory limit.

A drawn pattern is best where every pass takes one tick. Elsewhere nobody knows the best, but it is
cheap to try: patterns with W where it happens to fit, blocks at other paces, greedy schedules with
other priorities. All are simulated, and local search starts from the best few.

  patterns of the family -- blocks of other paces -- greedy --> the best few -- local search --> one

The number of trials shrinks with size, so that the time grows no faster than the schedule.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from jaxpipe.schedules.actions import ScheduleError
from jaxpipe.schedules.planning.v_trials import Task, Trial, greedy, paces
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate
from jaxpipe.schedules.solver.bounds import lower_bound
from jaxpipe.schedules.solver.improve import improve
from jaxpipe.schedules.solver.problem import Objective, Problem, pose

# Actions in all trials together, and moves of local search times actions: a second or so each.
_TRIALS = 100_000
_MOVES = 1_000_000
# Further moves find little.
_MOST_TRIALS = 150
_MOST_MOVES = 2500
_STARTS = 4
# Seeds of local search for each start.
_SEEDS = 2
# Searches in a row that find nothing better, after which no more are tried.
_VAIN = 4

_Value = tuple[float, float]


def best_v(task: Task, patterns: Sequence[Trial]) -> Schedule:
  """Searches for the best schedule of a task.

  Args:
    task: sizes, costs, limits and objective.
    patterns: trials of the family's own; the first ones are tried whatever the size.

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
  """Yields the starts of local search: a schedule, the objective, and a seed."""
  # A link that is busy is more than local search plans with.
  if _moves(task) < _MOST_MOVES // 10 or task.costs.hop_occupies_link:
    return
  # A shorter span may take a longer step, so both are looked at; the reverse is rare.
  objectives = _objectives(task) if task.objective == "span" else _objectives(task)[:1]
  for seed, objective in itertools.product(range(_SEEDS), objectives):
    for _, schedule in found[:_STARTS]:
      yield schedule, objective, seed


def _moves(task: Task) -> int:
  """Returns the number of moves of one local search."""
  return task.effort * min(_MOST_MOVES, _MOVES // _actions(task))


def _key(value: _Value, reference: _Value) -> tuple[bool, float, float]:
  """Returns the key by which schedules are compared, given the values of the first pattern.

  A schedule whose second objective is worse than that of the first pattern comes last, whatever it
  gains in the first.
  """
  return value[1] > reference[1], *value


def _actions(task: Task) -> int:
  """Returns the number of F, I and W of a schedule."""
  return 3 * task.placement.stages * task.microbatches


def _tried(task: Task, patterns: Sequence[Trial]) -> list[tuple[_Value, Schedule]]:
  """Returns schedules with their values, in the order in which they were tried."""
  count = max(1, min(_MOST_TRIALS, _TRIALS // _actions(task)))
  found: list[tuple[_Value, Schedule]] = []
  # Greedy ones always fit, so a search that runs out of patterns goes on until something does.
  for i, trial in enumerate(itertools.chain(patterns, greedy(task), paces(task))):
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
  """Returns the first and the second objective of a schedule."""
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
  """Returns the task's objective, then the other one."""
  return ("span", "makespan") if task.objective == "span" else ("makespan", "span")


def _problem(task: Task, objective: Objective) -> Problem:
  """Returns a task in whole numbers, for one of its objectives."""
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
  """Returns the result of one local search, with its values."""
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
