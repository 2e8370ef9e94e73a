"""Finds the best schedule there is, with a proof, by a constraint solver: for small problems.

The model is the simulator's: an interval of time per F, I and W; the intervals of one device do
not overlap; each waits for what it needs, and for the hop; what a device holds is a reservoir that
an F fills where it starts and an I and a W drain where they end. CP-SAT of OR-tools (an optional
dependency: `pip install jaxpipe[search]`) closes the gap between schedules and bounds.

Microbatches are in order on every stage, for every kind; `problem` proves that this loses nothing.
Only W's are left in any order where backwards may be fused: there a W can be tied to its own I.
"""

import dataclasses
from typing import Any

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import REQUIRED, Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.solver.problem import Found, Letter, Problem
from jaxpipe.schedules.solver.run import run

# CP-SAT counts in 64 bits and loses speed long before.
_LONGEST = 2**40


def exact(
  problem: Problem, hint: Schedule, *, bound: int = 0, seconds: float = 60, seed: int = 0
) -> Found:
  """Solves a problem to optimality if time allows.

  Args:
    problem: letters, times and limits.
    hint: a legal schedule within the limits, of F, I, W and B; the answer is at least as good.
    bound: a number that no schedule's objective is known to go below.
    seconds: limit on the solver's own clock, which counts work: the same arguments give the same
      answer on every machine, sooner or later.
    seed: seed of the solver.

  Returns:
    The best schedule found and the bound that was proven, in units of the problem.

  Raises:
    ImportError: OR-tools are not installed.
    ValueError: durations are too fine for the solver, or some are 0 under a memory limit.
  """
  try:
    from ortools.sat.python import cp_model
  except ImportError as error:
    raise ImportError(
      "the exact search needs OR-tools; pip install jaxpipe[search], or use exact=False"
    ) from error
  value = problem.value(hint)
  if value is None:
    raise ValueError(f"{hint.name} does not fit the limits; give a hint that does")
  _refuse(problem, value)
  model = _Model(cp=cp_model.CpModel(), problem=problem, horizon=_horizon(problem, value))
  _add(model, value, bound)
  _hint(model, hint)
  solver = cp_model.CpSolver()
  solver.parameters.num_workers = 1
  solver.parameters.random_seed = seed
  solver.parameters.max_deterministic_time = seconds
  status = solver.solve(model.cp)
  # A bound holds even where time ran out before any solution was found.
  proven = max(bound, round(solver.best_objective_bound))
  best = hint
  if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
    found = _read(model, solver)
    reached = problem.value(found)
    # Run as soon as possible, an order is never later than the solver timed it.
    if reached is not None and reached < value:
      best, value = found, reached
  return Found(schedule=best, value=value, lower_bound=proven, optimal=value <= proven)


@dataclasses.dataclass(kw_only=True)
class _Model:
  """A constraint model in the making.

  Its variables are `Any`, because OR-tools have no types of their own that all versions share.

  Attributes:
    cp: the CP-SAT model.
    problem: letters, times and limits.
    horizon: a time at which some schedule that is at least as good has ended.
    start: (letter, microbatch) -> integer variable, the time at which it starts.
    fused: (stage, microbatch) -> Boolean variable, whether the backward is one B; empty where
      fusing cannot help.
  """

  cp: Any
  problem: Problem
  horizon: int
  start: dict[tuple[Letter, int], Any] = dataclasses.field(default_factory=dict)
  fused: dict[tuple[int, int], Any] = dataclasses.field(default_factory=dict)


def solvable(problem: Problem) -> bool:
  """Whether the model describes a problem faithfully.

  A device does several things at one time if some take none, and under a memory limit a reservoir
  cannot tell which came first.
  """
  return problem.limits is None or min(problem.times) > 0


def _refuse(problem: Problem, value: int) -> None:
  """Raises ValueError for a problem that the solver cannot be given."""
  if value > _LONGEST:
    raise ValueError(
      f"the objective is {value} in whole units, above {_LONGEST}; round the costs to fewer digits"
    )
  if not solvable(problem):
    raise ValueError("a duration of 0 under a memory limit; use a positive one, or exact=False")


def _heads(problem: Problem) -> dict[int, int]:
  """Returns when the first forward of each device starts, by the device's first stage.

  A device begins with microbatch 0 of its first stage, as soon as that arrives. The time is fixed
  if all stages before are first stages of devices too, as on a loop, a V and a wave; else the
  result is empty.
  """
  heads, clock = {}, 0
  firsts = {min(row) for row in problem.placement.table}
  for s in range(len(firsts)):
    if s not in firsts:
      return {}
    clock += problem.lags[s]
    heads[s] = clock
    clock += problem.times[s]
  return heads


def _horizon(problem: Problem, value: int) -> int:
  """Returns a time at which some schedule that is at least as good has ended."""
  if problem.objective == "makespan":
    return value
  heads = _heads(problem)
  # Else a device may begin when another has ended, and so on.
  P, S = problem.placement.devices, problem.placement.stages
  return max(heads.values()) + value if heads else P * value + S * problem.hop


def _add(model: _Model, value: int, bound: int) -> None:
  """Adds variables, constraints and objective to a model."""
  problem, cp = model.problem, model.cp
  S, M = problem.placement.stages, problem.microbatches
  for t in range(3 * S):
    for m in range(M):
      model.start[t, m] = cp.new_int_var(0, model.horizon - problem.times[t], "")
  if problem.fusable:
    for s in range(S):
      for m in range(M):
        model.fused[s, m] = cp.new_bool_var("")
  for t in range(3 * S):
    for m in range(M):
      _precede(model, t, m)
  for d, row in enumerate(problem.placement.table):
    letters = [k * S + s for k in range(3) for s in row]
    cp.add_no_overlap(
      cp.new_fixed_size_interval_var(model.start[t, m], problem.times[t], "")
      for t in letters
      for m in range(M)
    )
    if problem.limits is not None:
      _hold(model, d, problem.limits[d])
  _minimize(model, value, bound)


def _precede(model: _Model, t: Letter, m: int) -> None:
  """Adds the waits of a letter of one microbatch: for its turn, its stage and another stage."""
  problem, cp, start = model.problem, model.cp, model.start
  S, times = problem.placement.stages, problem.times
  if m and (t < 2 * S or not problem.fusable):
    cp.add(start[t, m] >= start[t, m - 1] + times[t])
  if t >= S:
    cp.add(start[t, m] >= start[t - S, m] + times[t - S])
  p = problem.inputs[t]
  if p is not None:
    cp.add(start[t, m] >= start[p, m] + times[p] + problem.lags[t])
  if t < 2 * S and t >= S and problem.fusable:
    # A fused B: W follows at once, and the stage before waits for both.
    s, fused = t - S, model.fused[t - S, m]
    end = start[t + S, m] + times[t + S]
    cp.add(start[t + S, m] == start[t, m] + times[t]).only_enforce_if(fused)
    if s:
      cp.add(start[t - 1, m] >= end + problem.lags[t - 1]).only_enforce_if(fused)


def _hold(model: _Model, d: int, limit: int) -> None:
  """Adds the memory limit of one device, as a reservoir that must not overflow."""
  problem, start = model.problem, model.start
  S, times, changes = problem.placement.stages, problem.times, problem.changes
  when: list[Any] = []
  what: list[int] = []
  whether: list[Any] = []
  for s in problem.placement.table[d]:
    i, w = S + s, 2 * S + s
    for m in range(problem.microbatches):
      i_end, w_end = start[i, m] + times[i], start[w, m] + times[w]
      events = [(start[s, m], changes[s], 1), (i_end, changes[i], 1), (w_end, changes[w], 1)]
      if problem.fusable:
        fused = model.fused[s, m]
        events[1:] = [
          (i_end, changes[i], fused.negated()),
          (w_end, changes[i], fused),
          (w_end, changes[w], 1),
        ]
      for at, change, present in events:
        # An I changes nothing by default, and then is no event.
        if change:
          when.append(at)
          what.append(change)
          whether.append(present)
  # The constraint wants a lower limit, too; this one cannot be passed.
  low = sum(min(change, 0) for change in what)
  model.cp.add_reservoir_constraint_with_active(when, what, whether, low, limit)


def _minimize(model: _Model, value: int, bound: int) -> None:
  """Adds the objective, between a bound and the value of a known schedule."""
  problem, cp, start = model.problem, model.cp, model.start
  S, last = problem.placement.stages, problem.microbatches - 1
  objective = cp.new_int_var(bound, value, "")
  for s, at in _heads(problem).items():
    cp.add(start[s, 0] == at)
  for row in problem.placement.table:
    # A device begins with the first forward of its first stage: the others wait for that.
    begin = start[min(row), 0] if problem.objective == "span" else 0
    for s in row:
      for m in range(problem.microbatches) if problem.fusable else (last,):
        cp.add(objective >= start[2 * S + s, m] + problem.times[2 * S + s] - begin)
  cp.minimize(objective)


def _hint(model: _Model, hint: Schedule) -> None:
  """Hints at the start times of a schedule, its microbatches numbered in the order of its words."""
  timed = run(model.problem, model.problem.words(hint))
  assert timed is not None
  for t, row in enumerate(timed.letters):
    for m, at in enumerate(row):
      model.cp.add_hint(model.start[t, m], at)


def _read(model: _Model, solver: Any) -> Schedule:
  """Returns the schedule of a solution: letters by time, and those of no duration by dependency."""
  problem = model.problem
  S, times = problem.placement.stages, problem.times
  rows = []
  for stages in problem.placement.table:
    row = []
    for s in stages:
      for m in range(problem.microbatches):
        fused = problem.fusable and solver.value(model.fused[s, m])
        for k, kind in enumerate(REQUIRED):
          at = solver.value(model.start[k * S + s, m])
          rank = (at, at + times[k * S + s], k, -s if k == 1 else s, m)
          if not (fused and kind is Kind.W):
            row.append((rank, Action(s, Kind.B if fused and kind is Kind.I else kind, m)))
    rows.append(tuple(action for _, action in sorted(row, key=lambda x: x[0])))
  return Schedule("search", problem.placement, problem.microbatches, tuple(rows))
