"""Automatic zero bubble: planned for given costs and memory (Qi et al., 2023, arXiv:2401.10241).

P=3, M=4, memory for three microbatches, where I takes twice as long as F or W:

  device 0 | F0 F1 F2             I0--- W0 F3 I1--- W1 I2--- W2 I3--- W3 | peak 3
  device 1 |    F0 F1       I0--- F2 I1--- W0 F3 I2--- W1 I3--- W2 W3    | peak 3
  device 2 |       F0 I0--- F1 I1--- F2 I2--- W0 F3 I3--- W1 W2 W3       | peak 3

The paper's heuristic fills each device with forwards before the first gradient comes back, then
alternates, and puts a W where a gap holds it, where the gap would else be the device's longest, or
where memory is needed; it tries the eight settings of three switches. Here time is walked once for
all devices (`fill`), the grid is over depth, patience, reserve and order, and the best few are
improved by a bounded local search (`improve`). Times, memory and limits may differ by stage.

Chosen is the shortest span, then the shortest makespan, then the least memory, of all that are no
longer in makespan than GPipe, 1F1B, ZB-H1 and ZB-H2 where these fit.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.families.gpipe import gpipe
from jaxpipe.schedules.families.one_f_one_b import one_f_one_b
from jaxpipe.schedules.families.zero_bubble import zb_h1, zb_h2
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.solver.bounds import lower_bound
from jaxpipe.schedules.solver.fill import Policy, fill
from jaxpipe.schedules.solver.improve import improve
from jaxpipe.schedules.solver.problem import Problem, Words, pose
from jaxpipe.schedules.solver.run import run
from jaxpipe.schedules.spec import Spec
from jaxpipe.schedules.transforms.backward import with_backward

# Effort, in actions placed: of the grid and of the local search. Counted rather than timed, so
# that every process of a job plans the same.
_GRID = 220_000
_SEARCH = 2_400_000
_MOST_MOVES = 3_000
_LEAST_POLICIES = 4
_STARTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """A candidate that fits the limits.

  Attributes:
    words: the word of each device, see `solver.problem`.
    key: span, makespan and largest peak of memory, in units of the problem; the least is the best.
    schedule: a schedule whose fused B must stay whole, where words would not fit the limits; else
      None.
  """

  words: Words
  key: tuple[int, int, int]
  schedule: Schedule | None = None


def zb_auto(spec: Spec) -> Schedule:
  """Builds the best plan found for `spec.costs` within `spec.memory_limit`.

  Args:
    spec: devices and microbatches, one stage per device; costs and memory, by stage where they
      differ; the limit, by device where it differs.

  Returns:
    The schedule, its backward split; fused only where a lone I holds more than the limit.

  Raises:
    ValueError: no schedule fits the limit; the message names the least that would do.
  """
  problem = pose(
    placement=Placement.loop(spec.devices),
    microbatches=spec.microbatches,
    costs=spec.costs,
    memory=spec.memory,
    memory_limit=spec.memory_limit,
    objective="span",
  )
  named = [plan for s in _named(spec) if (plan := _plan_of(problem, s))]
  most = min((plan.key[1] for plan in named), default=math.inf)
  alone = _plan_of(problem, _one_by_one(spec))
  if alone is None:
    raise _too_low(problem, spec)
  pool = [plan for plan in (*named, *_grid(problem), alone) if plan.key[1] <= most]
  best = min((*pool, *_improved(problem, pool, most)), key=lambda plan: plan.key)
  if best.schedule is not None:
    return dataclasses.replace(best.schedule, name="zb-auto")
  return problem.schedule(best.words, "zb-auto")


def _named(spec: Spec) -> Iterator[Schedule]:
  """Yields the schedules that a plan must not be longer than."""
  for build in (gpipe, one_f_one_b):
    fused = build(spec)
    yield from (fused, with_backward(fused, "deferred", spec.costs))
  yield from (zb_h1(spec), zb_h2(spec))


def _one_by_one(spec: Spec) -> Schedule:
  """Returns the schedule that runs one microbatch after the other, forward and backward."""
  # Nothing holds less: every backward needs the forward before it.
  order = tuple(
    tuple(Action(d, kind, m) for m in range(spec.microbatches) for kind in (Kind.F, Kind.B))
    for d in range(spec.devices)
  )
  return Schedule("zb-auto", Placement.loop(spec.devices), spec.microbatches, order)


def _plan_of(problem: Problem, schedule: Schedule) -> _Plan | None:
  """Returns a schedule as a candidate, its backwards split where that fits; None if it does not."""
  words = problem.words(schedule)
  plan = _plan(problem, words)
  if plan is not None or not problem.fusable or problem.value(schedule) is None:
    return plan
  timed = _timed(problem, words)
  return timed and _Plan(words=words, key=(*timed, max(problem.peaks(schedule))), schedule=schedule)


def _plan(problem: Problem, words: Words) -> _Plan | None:
  """Returns words as a candidate; None if they do not fit the limits, or dead-lock."""
  peaks = [
    max(itertools.accumulate((problem.changes[t] for t in word), initial=0)) for word in words
  ]
  if problem.limits and any(a > b for a, b in zip(peaks, problem.limits, strict=True)):
    return None
  timed = _timed(problem, words)
  return timed and _Plan(words=words, key=(*timed, max(peaks)))


def _timed(problem: Problem, words: Words) -> tuple[int, int] | None:
  """Returns span and makespan of words; None if they dead-lock."""
  timed = run(problem, words)
  if timed is None:
    return None
  ends = [row[-1] + problem.times[word[-1]] for row, word in zip(timed.rows, words, strict=True)]
  return timed.value[0], max(ends)


def _grid(problem: Problem) -> Iterator[_Plan]:
  """Yields what the policies of the grid make, as far as the effort goes."""
  actions = len(problem.times) * problem.microbatches
  count = max(_LEAST_POLICIES, _GRID // actions)
  bound = lower_bound(problem)
  for policy in itertools.islice(_policies(problem), count):
    words = fill(problem, policy)
    plan = words and _plan(problem, words)
    if plan:
      yield plan
      # In a large problem nothing more is tried once the span is proven to be the best.
      if plan.key[0] <= bound and actions * _LEAST_POLICIES > _GRID:
        return


def _policies(problem: Problem) -> Iterator[Policy]:
  """Yields the policies of the grid, each once, the likeliest first."""
  P = problem.placement.devices
  none = (0,) * P
  seen = set()
  for kept, patience, depth in itertools.product((0, 1, 2), (1.0, 0.5, 0.0), _depths(problem)):
    # Without patience a reserve is never touched, whatever its size.
    reserve = tuple((kept if patience else 0) * d for d in range(P))
    for ahead, strict in itertools.product((none, depth), (True, False)):
      policy = Policy(depth=depth, strict=strict, patience=patience, kept=reserve, ahead=ahead)
      if policy not in seen:
        seen.add(policy)
        yield policy


def _depths(problem: Problem) -> list[tuple[int, ...]]:
  """Returns numbers of forwards in flight to try, each by device.

  They are multiples of 1F1B's, which counts the hops to the last stage, or of the work that fits
  into the round trip there and back.
  """
  P, M = problem.placement.devices, problem.microbatches
  pace = max(sum(problem.times[k * P + d] for k in range(3)) for d in range(P)) or 1
  trips, clock = [0.0] * P, 0
  for d in reversed(range(P)):
    clock += problem.times[P + d]
    trips[d] = clock / pace
    clock += problem.times[d] + 2 * problem.hop
  depths = [(M,) * P]
  for share in (1, 2, 1.5, 1.25, 3):
    depths.append(tuple(min(M, 1 + round(share * (P - 1 - d))) for d in range(P)))
    depths.append(tuple(min(M, 1 + round(share * trip)) for trip in trips))
  return depths


def _improved(problem: Problem, pool: list[_Plan], most: float) -> Iterator[_Plan]:
  """Yields the results of local search from the best few candidates."""
  bound = lower_bound(problem)
  words = [plan for plan in pool if plan.schedule is None]
  starts = {str(plan.words): plan for plan in sorted(words, key=lambda plan: plan.key)}
  moves = min(_MOST_MOVES, _SEARCH // (_STARTS * len(problem.times) * problem.microbatches))
  for plan in itertools.islice(starts.values(), _STARTS):
    if plan.key[0] <= bound:
      return
    better, _ = improve(problem, plan.words, moves=moves, bound=bound)
    found = _plan(problem, better)
    if found is not None and found.key[1] <= most:
      yield found


def _too_low(problem: Problem, spec: Spec) -> ValueError:
  """Returns the error that says which limit is too low, and what would do."""
  needs = problem.peaks(_one_by_one(spec))
  assert problem.limits is not None  # without limits everything fits
  d = next(d for d, limit in enumerate(problem.limits) if needs[d] > limit)
  need, limit = (x / problem.memory_scale for x in (needs[d], problem.limits[d]))
  # One limit for all must suit the greediest device; a list says what each of them needs.
  wanted = needs if isinstance(spec.memory_limit, Sequence) else (max(needs),)
  least = ",".join(f"{x / problem.memory_scale:g}" for x in wanted)
  return ValueError(
    f"zb-auto cannot run within memory_limit={limit:g}: one microbatch alone holds {need:g} on"
    f" device {d}; use memory_limit={least} or more"
  )
