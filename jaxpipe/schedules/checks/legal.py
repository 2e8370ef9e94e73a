"""Legality: a schedule does all of the work, once, where the weights are, and comes to an end.

Every error is one line that names an action and its device, because a schedule that somebody
writes by hand or reads from a file is usually wrong in one place only.
"""

from collections.abc import Sequence

from jaxpipe.schedules.actions import Action, ScheduleError
from jaxpipe.schedules.checks.extras import check_extras
from jaxpipe.schedules.kinds import PRODUCTS, REQUIRED, STAGE_KINDS, Kind
from jaxpipe.schedules.protocol import OrderedActions, Ticks
from jaxpipe.schedules.walk import Visit, walk

# The maker of each product: product -> (stage, microbatch) -> (device, action).
_Seen = dict[Kind, dict[tuple[int, int], tuple[int, Action]]]


def check(schedule: OrderedActions) -> None:
  """Raises unless the schedule is a legal training step.

  Legal means that each microbatch has its forward and its backward (`B`, or both `I` and `W`) on
  each stage of its path exactly once, all on one device that holds the stage, that the other kinds
  of action stand where they mean something, and that the devices, each running its list in order,
  all reach the end of it.

  Args:
    schedule: a schedule, however it was made.

  Raises:
    ScheduleError: in one line, the first action found missing, duplicate or misplaced, or the
      first one that can never run and what it waits for.
  """
  rows, P = len(schedule.order), schedule.devices
  if rows != P:
    raise ScheduleError(f"{rows} rows for {P} devices; give one row each")
  _check_paths(schedule)
  # In this order, so that a missing action is reported as missing, and not as the dead-lock that it
  # also causes.
  _check_complete(_take_stock(schedule), schedule)
  check_extras(schedule)
  # Walking to the end is the proof; where things happen in time does not matter.
  visits = list(walk(schedule))
  if schedule.ticks is not None:
    _check_ticks(schedule.ticks, visits, schedule)


def _check_ticks(ticks: Ticks, visits: Sequence[Visit], schedule: OrderedActions) -> None:
  """Raises unless every step has a tick of its own, after those of all that it needs."""
  lengths = [len(row) for row in schedule.order]
  if [len(row) for row in ticks] != lengths:
    raise ScheduleError(
      f"ticks have {[len(row) for row in ticks]} numbers for lists of {lengths} steps; give one"
      " for each step, or leave out the ticks"
    )
  # Tables have a row for every tick up to the last.
  last, most = max((row[-1] for row in ticks if row), default=0), 100 + 10 * sum(lengths)
  if last > most:
    raise ScheduleError(
      f"tick {last} is beyond {most}, which is plenty for {sum(lengths)} steps; leave out ticks on"
      " which no device works"
    )
  made: dict[int, tuple[int, Visit]] = {}
  position = [0] * len(ticks)
  for visit in visits:
    row, i = ticks[visit.device], position[visit.device]
    position[visit.device] += 1
    if row[i] < 0 or (i and row[i] <= row[i - 1]):
      raise ScheduleError(
        f"{visit.step} on device {visit.device} has tick {row[i]}"
        + (f" after {row[i - 1]}" if i else "")
        + "; ticks of a device rise from 0 or more"
      )
    for slot in visit.needs:
      before, maker = made[slot]
      if before >= row[i]:
        raise ScheduleError(
          f"{visit.step} on device {visit.device} has tick {row[i]}, and waits for {maker.step} on"
          f" device {maker.device}, which has {before}; give it a later tick"
        )
    made.update((slot, (row[i], visit)) for slot in visit.makes)


def _check_paths(schedule: OrderedActions) -> None:
  """Raises unless every microbatch has a path, of stages that exist, each at most once."""
  if schedule.paths is None:
    return
  if len(schedule.paths) != schedule.microbatches:
    raise ScheduleError(
      f"{len(schedule.paths)} paths for {schedule.microbatches} microbatches; give one path each"
    )
  for m, path in enumerate(schedule.paths):
    if not path or len(set(path)) < len(path) or not set(path) <= set(range(schedule.stages)):
      raise ScheduleError(
        f"microbatch {m} cannot take the path {list(path)}; name some of the stages"
        f" 0..{schedule.stages - 1}, each at most once"
      )


def _take_stock(schedule: OrderedActions) -> _Seen:
  """Returns which action makes each product, refusing duplicate and misplaced actions."""
  seen: _Seen = {kind: {} for kind in Kind}
  for d, row in enumerate(schedule.order):
    # The row's own stages, rather than the one home of each stage: with replicas a stage has two.
    held = set(schedule.placement.table[d])
    for step in row:
      for action in step.parts:
        if action.kind in STAGE_KINDS:
          _take(action, d, held, seen, schedule)
  return seen


def _take(action: Action, d: int, held: set[int], seen: _Seen, schedule: OrderedActions) -> None:
  """Adds the products of one action of device d, which holds the stages `held`, to `seen`."""
  stage, m = action.stage, action.microbatch
  if stage not in held:
    raise _misplaced(action, d, schedule)
  if m >= schedule.microbatches:
    raise ScheduleError(
      f"{action} on device {d} is beyond the last of {schedule.microbatches} microbatches,"
      f" {schedule.microbatches - 1}"
    )
  # A recompute feeds its own stage's backward; after it, it would feed nothing.
  if action.kind is Kind.R and (stage, m) in seen[Kind.I]:
    raise ScheduleError(
      f"{action} on device {d} is misplaced: it comes after {seen[Kind.I][stage, m][1]},"
      " which needs it"
    )
  for product in PRODUCTS[action.kind]:
    # Also catches a B beside an I or a W: they make the same products.
    if (stage, m) in seen[product]:
      raise _duplicate(action, d, *seen[product][stage, m])
    seen[product][stage, m] = d, action


def _misplaced(action: Action, d: int, schedule: OrderedActions) -> ScheduleError:
  """Returns the error for an action on a device that does not hold its stage."""
  if action.stage >= schedule.stages:
    return ScheduleError(
      f"{action} on device {d} is misplaced: there are {schedule.stages} stages,"
      f" 0 to {schedule.stages - 1}"
    )
  homes = _devices(schedule.placement.homes(action.stage))
  return ScheduleError(
    f"{action} on device {d} is misplaced: stage {action.stage} lives on {homes}"
  )


def _devices(homes: tuple[int, ...]) -> str:
  """Returns `device 2`, or `devices 1 and 2` for a stage with two replicas."""
  return f"device {homes[0]}" if len(homes) == 1 else f"devices {' and '.join(map(str, homes))}"


def _duplicate(action: Action, d: int, first_d: int, first: Action) -> ScheduleError:
  """Returns the error for an action whose product another one has made already."""
  if action == first:
    return ScheduleError(f"{action} on device {d} is a duplicate: device {first_d} runs it already")
  return ScheduleError(f"{action} on device {d} is a duplicate of the work of {first}")


def _check_complete(seen: _Seen, schedule: OrderedActions) -> None:
  """Raises unless every stage of every path has its passes, each microbatch's on one device."""
  if schedule.paths is not None:
    _check_off_path(seen, schedule)
  for m in range(schedule.microbatches):
    for stage in schedule.path(m):
      for product in REQUIRED:
        if (stage, m) not in seen[product]:
          raise _missing(Action(stage, product, m), seen, schedule)
  # Without replicas every stage has one device, and everything on it is already known to be there.
  if schedule.placement.replicated:
    _check_together(seen)


def _check_off_path(seen: _Seen, schedule: OrderedActions) -> None:
  """Raises where a microbatch has an action on a stage that its path leaves out."""
  ways = [set(schedule.path(m)) for m in range(schedule.microbatches)]
  for makers in seen.values():
    for (stage, m), (d, action) in makers.items():
      if stage not in ways[m]:
        raise ScheduleError(
          f"{action} on device {d} is misplaced: microbatch {m} leaves stage {stage} out"
        )


def _check_together(seen: _Seen) -> None:
  """Raises where a backward runs on another replica of its stage than its forward did."""
  for kind in (Kind.R, Kind.I, Kind.W):
    for key, (d, action) in seen[kind].items():
      home, forward = seen[Kind.F][key]
      if d != home:
        raise ScheduleError(
          f"{action} on device {d} is misplaced: device {home} runs {forward} and keeps"
          " what it needs"
        )


def _missing(action: Action, seen: _Seen, schedule: OrderedActions) -> ScheduleError:
  """Names a missing action and, where there is one, an action that waits for it."""
  stage, m = action.stage, action.microbatch
  token = str(action)
  # Where neither half of a backward exists, the fused form is as good an answer.
  if action.kind is Kind.I and (stage, m) not in seen[Kind.W]:
    token = f"{stage}B{m} (or {stage}I{m} and {stage}W{m})"
  path = schedule.path(m)
  i = path.index(stage)
  # Its own stage's next step comes first: it is on the same device, where the mistake was made.
  if action.kind is Kind.F:
    candidates = [(Kind.I, i), (Kind.F, i + 1)]
  else:
    candidates = [(Kind.W, i), (Kind.I, i - 1)]
  waiters = (seen[kind].get((path[j], m)) for kind, j in candidates if 0 <= j < len(path))
  waiter = next((found for found in waiters if found is not None), None)
  tail = "" if waiter is None else f": {waiter[1]} on device {waiter[0]} waits for it"
  return ScheduleError(f"{token} is missing on {_devices(schedule.placement.homes(stage))}{tail}")
