"""Searches for the best schedule of given costs: per-stage times and per-device memory limits.

Three steps, each of which can only improve on the one before: every named schedule of the same
placement that fits, with its backwards fused, split and deferred, and what `greedy` builds; local
search round the best of them (`improve`); and, where the problem is small, a constraint solver that
proves the optimum (`exact`). A bound from single devices and microbatches (`bounds`) ends it early.

P=3, M=4; F takes 2, 1, 1 by stage, I 1, 2, 1, W 1, 1, 2; memory for 3, 2 and 2 microbatches. 1F1B
with split backwards takes 21 here, and no schedule less than 19:

  device 0 | F0--- F1--- F2---    I0 W0 I1 F3--- W1       I2 W2 I3 W3 | peak 3
  device 1 |       F0    F1 I0--- I1--- W0 F2 W1 F3 I2--- I3--- W2 W3 | peak 2
  device 2 |          F0 I0 F1 I1 W0--- W1--- F2 I2 F3 I3 W2--- W3--- | peak 2
"""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.build import make_schedule
from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.solver import exact as solver
from jaxpipe.schedules.solver.bounds import lower_bound
from jaxpipe.schedules.solver.greedy import POLICIES, build
from jaxpipe.schedules.solver.improve import improve
from jaxpipe.schedules.solver.problem import Found, Objective, Problem, Words, pose
from jaxpipe.schedules.solver.run import run
from jaxpipe.schedules.transforms.backward import BACKWARDS

# Local optima differ, so the moves are shared out among so many starts.
_STARTS = 6
# Most F, I and W together that the solver is given unasked: P=4, V=2, M=5, or about a second.
_SMALL = 120


def search(
  *,
  devices: int,
  microbatches: int,
  chunks: int = 1,
  placement: str | Placement = "loop",
  costs: Costs | None = None,
  memory: Memory = (1, 0, -1),
  memory_limit: float | Sequence[float] | None = None,
  objective: Objective = "makespan",
  exact: bool | None = None,
  moves: int = 12_000,
  seconds: float = 20,
  seed: int = 0,
) -> Found:
  """Searches for a schedule.

  Effort is counted, not timed, and all chance is seeded: every process of a job that asks the same
  gets the same schedule.

  Args:
    devices: number of devices, P.
    microbatches: number of microbatches, M.
    chunks: stages per device, V.
    placement: which device holds which stage: a name or a table.
    costs: durations, each one number or one per stage.
    memory: changes of the memory that a device holds by F, I and W, each one number or one per
      stage.
    memory_limit: most memory that a device may hold: one number, or one per device.
    objective: `makespan`, or `span` for the longest single device.
    exact: whether to prove the optimum with OR-tools (`pip install jaxpipe[search]`); by default
      where they are installed and the problem is small.
    moves: effort of the local search.
    seconds: effort of the solver, on its own clock.
    seed: of the local search and the solver.

  Returns:
    The best schedule found, never worse than any named schedule of the placement that fits.

  Raises:
    ImportError: `exact=True` and OR-tools are not installed.
    ValueError: the sizes or lists do not fit each other, or no schedule found fits the limit.

  >>> search(devices=2, microbatches=2, memory_limit=2, exact=False).value
  7
  """
  for word, number in (("devices", devices), ("microbatches", microbatches), ("chunks", chunks)):
    if number < 1:
      raise ValueError(f"search cannot run with {word}={number}; use {word}=1 or more")
  costs = costs or Costs()
  problem = pose(
    placement=_placement(placement, devices, chunks),
    microbatches=microbatches,
    costs=costs,
    memory=memory,
    memory_limit=memory_limit,
    objective=objective,
  )
  bound = lower_bound(problem)
  pool = [*named_schedules(problem, costs, memory, memory_limit), *_made(problem)]
  fitting = [(value, s) for s in pool if (value := problem.value(s)) is not None]
  if not fitting:
    raise _too_low(problem)
  value, best = min(fitting, key=lambda found: found[0])
  found = Found(schedule=best, value=value, lower_bound=bound, optimal=value <= bound)
  if not found.optimal:
    found = _improved(problem, found, [s for _, s in fitting], moves, seed)
  if not found.optimal or exact:
    found = _proven(problem, found, exact, seconds, seed)
  return dataclasses.replace(
    found,
    schedule=found.schedule.check(),
    value=_unscaled(found.value, problem.scale),
    lower_bound=_unscaled(found.lower_bound, problem.scale),
  )


def named_schedules(
  problem: Problem,
  costs: Costs,
  memory: Memory,
  memory_limit: float | Sequence[float] | None,
) -> Iterator[Schedule]:
  """Yields every schedule of the registry that fits a problem, each different one once.

  Args:
    problem: sizes and placement.
    costs: durations that a family may plan with.
    memory: changes of the memory that a device holds by F, I and W.
    memory_limit: most memory that a device may hold: one number, or one per device.

  Yields:
    Schedules on the problem's placement, with their backwards as the family has them, fused, split
    and deferred.
  """
  seen = set()
  P, V = problem.placement.devices, problem.placement.chunks
  for name, family in FAMILIES.items():
    if not family.fits(P, V):
      continue
    for backward in (None, *BACKWARDS):
      try:
        schedule = make_schedule(
          name,
          devices=P,
          microbatches=problem.microbatches,
          chunks=V,
          backward=backward,
          costs=costs,
          memory=memory,
          memory_limit=memory_limit,
        )
      # Too much memory, or backwards that the family places on its own.
      except ValueError:
        continue
      if _comparable(problem, schedule) and schedule.order not in seen:
        seen.add(schedule.order)
        yield schedule
      # A family that splits its own backwards leaves none to split, and may have planned for long.
      if backward is None and not any(
        a.kind is Kind.B for row in schedule.order for s in row for a in s.parts
      ):
        break


def _comparable(problem: Problem, schedule: Schedule) -> bool:
  """Whether a schedule does the problem's work and no other: F, I, W and B, on its placement."""
  whole = schedule.paths is None and not schedule.vocabulary
  return (
    whole
    and schedule.placement == problem.placement
    and all(isinstance(a, Action) and a.kind.info.necessary for row in schedule.order for a in row)
  )


def _made(problem: Problem) -> Iterator[Schedule]:
  """Yields schedules that are in no registry: one microbatch at a time, and those of `greedy`."""
  # Nothing holds less: a device's first gradient needs one forward of each of its chunks.
  yield _one_by_one(problem)
  for policy in POLICIES:
    words = build(problem, policy)
    if words is not None:
      yield problem.schedule(words)


def _one_by_one(problem: Problem) -> Schedule:
  """Returns the schedule that runs one microbatch after the other, forward and backward."""
  order = tuple(
    tuple(
      action
      for m in range(problem.microbatches)
      for action in (
        *(Action(s, Kind.F, m) for s in sorted(row)),
        *(Action(s, Kind.B, m) for s in sorted(row, reverse=True)),
      )
    )
    for row in problem.placement.table
  )
  return Schedule("search", problem.placement, problem.microbatches, order)


def _improved(problem: Problem, found: Found, pool: list[Schedule], moves: int, seed: int) -> Found:
  """Returns the best of a local search from the best few of the pool, their backwards split."""
  starts: list[tuple[tuple[int, int], Words]] = []
  for schedule in pool:
    words = problem.words(schedule)
    here = run(problem, words)
    fits = not problem.fusable or problem.value(problem.schedule(words)) is not None
    if here is not None and fits and (here.value, words) not in starts:
      starts.append((here.value, words))
  for i, (_, words) in enumerate(sorted(starts, key=lambda start: start[0])[:_STARTS]):
    words, value = improve(
      problem, words, moves=moves // _STARTS, bound=int(found.lower_bound), seed=seed + i
    )
    if value < found.value:
      found = dataclasses.replace(
        found,
        schedule=problem.schedule(words),
        value=value,
        optimal=value <= found.lower_bound,
      )
    if found.optimal:
      break
  return found


def _proven(problem: Problem, found: Found, exact: bool | None, seconds: float, seed: int) -> Found:
  """Returns the solver's answer, where it is asked for or the problem is small enough for it."""
  if exact is None:
    small = len(problem.times) * problem.microbatches <= _SMALL
    exact = small and importlib.util.find_spec("ortools") is not None and solver.solvable(problem)
  if not exact:
    return found
  return solver.exact(
    problem, found.schedule, bound=int(found.lower_bound), seconds=seconds, seed=seed
  )


def _placement(placement: str | Placement, devices: int, chunks: int) -> Placement:
  """Returns the placement of a name, or the given one if it has the sizes that were asked for."""
  if isinstance(placement, str):
    placement = Placement.named(placement, devices, devices * chunks)
  if (placement.devices, placement.chunks) != (devices, chunks):
    raise ValueError(
      f"the placement has {placement.devices} devices of {placement.chunks} chunks, not {devices}"
      f" of {chunks}; use devices={placement.devices}, chunks={placement.chunks}"
    )
  return placement


def _too_low(problem: Problem) -> ValueError:
  """Returns the error that says which device's limit is below what one microbatch holds there."""
  assert problem.limits is not None  # without limits everything fits
  needs, unit = problem.peaks(_one_by_one(problem)), problem.memory_scale
  d = next(d for d, limit in enumerate(problem.limits) if needs[d] > limit)
  return ValueError(
    f"one microbatch at a time holds {_unscaled(needs[d], unit)} on device {d}, above its"
    f" memory_limit of {_unscaled(problem.limits[d], unit)}; use at least that"
  )


def _unscaled(value: float, scale: int) -> float:
  """Returns a value in the caller's units, an integer where it is one."""
  return int(value) // scale if value % scale == 0 else value / scale
