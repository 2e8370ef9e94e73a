"""Legality: a schedule does all of the work, once, where the weights are, and comes to an end.

Every error is one line that names an action and its device, because a schedule that somebody
writes by hand or reads from a file is usually wrong in one place only.
"""

from jaxpipe.schedules.actions import PRODUCTS, Action, Kind, Order, ScheduleError
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.walk import dependencies, walk

# The rule lives with the walk; those who lower or check a schedule look for it here.
__all__ = ["check", "dependencies"]

# What must exist exactly once for every stage and microbatch of a training step.
_REQUIRED = (Kind.F, Kind.I, Kind.W)

# Who makes what: product -> (stage, microbatch) -> (device, action).
_Seen = dict[Kind, dict[tuple[int, int], tuple[int, Action]]]


def check(order: Order, placement: Placement, microbatches: int) -> None:
  """Raises unless the order is a legal training step.

  Legal means that each stage and microbatch has its forward and its backward (`B`, or both `I` and
  `W`) exactly once, on the device that holds the stage, and that the devices, each running its
  list in order, all reach the end of it.

  Args:
    order: one row of actions per device.
    placement: where the stages live.
    microbatches: number of microbatches, M.

  Raises:
    ScheduleError: in one line, the first action found missing, duplicate or misplaced, or the
      first one that can never run and what it waits for.
  """
  if len(order) != placement.devices:
    raise ScheduleError(f"{len(order)} rows for {placement.devices} devices; give one row each")
  # In this order, so that a missing action is reported as missing, and not as the dead-lock that it
  # also causes.
  _check_complete(_take_stock(order, placement, microbatches), placement, microbatches)
  # Walking to the end is the proof; where things happen in time does not matter.
  for _ in walk(order, placement.stages, microbatches):
    pass


def _take_stock(order: Order, placement: Placement, microbatches: int) -> _Seen:
  """Collects who produces what, refusing what is produced twice or in the wrong place."""
  seen: _Seen = {kind: {} for kind in Kind}
  for d, row in enumerate(order):
    # The row's own stages, rather than the one home of each stage: with replicas a stage has two.
    held = set(placement.table[d])
    for action in row:
      stage, m = action.stage, action.microbatch
      if stage not in held:
        raise _misplaced(action, d, placement)
      if m >= microbatches:
        raise ScheduleError(
          f"{action} on device {d} is beyond the last of {microbatches} microbatches,"
          f" {microbatches - 1}"
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
  return seen


def _misplaced(action: Action, d: int, placement: Placement) -> ScheduleError:
  if action.stage >= placement.stages:
    return ScheduleError(
      f"{action} on device {d} is misplaced: there are {placement.stages} stages,"
      f" 0 to {placement.stages - 1}"
    )
  home = placement.device(action.stage)
  return ScheduleError(
    f"{action} on device {d} is misplaced: stage {action.stage} lives on device {home}"
  )


def _duplicate(action: Action, d: int, first_d: int, first: Action) -> ScheduleError:
  if action == first:
    return ScheduleError(f"{action} on device {d} is a duplicate: device {first_d} runs it already")
  return ScheduleError(f"{action} on device {d} is a duplicate of the work of {first}")


def _check_complete(seen: _Seen, placement: Placement, microbatches: int) -> None:
  # Counting is enough when all is well: nothing was seen twice, and nothing out of range.
  expected = placement.stages * microbatches
  if all(len(seen[product]) == expected for product in _REQUIRED):
    return
  for stage in range(placement.stages):
    for m in range(microbatches):
      for product in _REQUIRED:
        if (stage, m) not in seen[product]:
          raise _missing(Action(stage, product, m), seen, placement)


def _missing(action: Action, seen: _Seen, placement: Placement) -> ScheduleError:
  """Names a missing action and, where there is one, an action that waits for it."""
  stage, m = action.stage, action.microbatch
  token = str(action)
  # Where neither half of a backward exists, the fused form is as good an answer.
  if action.kind is Kind.I and (stage, m) not in seen[Kind.W]:
    token = f"{stage}B{m} (or {stage}I{m} and {stage}W{m})"
  # Its own stage's next step comes first: it is on the same device, where the mistake was made.
  if action.kind is Kind.F:
    waiters = [seen[Kind.I].get((stage, m)), seen[Kind.F].get((stage + 1, m))]
  else:
    waiters = [seen[Kind.W].get((stage, m)), seen[Kind.I].get((stage - 1, m))]
  waiter = next((found for found in waiters if found is not None), None)
  tail = "" if waiter is None else f": {waiter[1]} on device {waiter[0]} waits for it"
  return ScheduleError(f"{token} is missing on device {placement.device(stage)}{tail}")
