"""How the backward pass of a schedule is cut, whatever the schedule.

Splitting B into I and W (Zero Bubble: Qi et al., 2023, arXiv:2401.10241; 2BP: Rae et al., 2024,
arXiv:2405.18047) is independent of the order of the passes, so it is applied to a finished
schedule and every family has it.
"""

import dataclasses
from collections.abc import Iterator

from jaxpipe.schedules.actions import Action, Kind, Step
from jaxpipe.schedules.schedule import Schedule

# All that the command line accepts, so that it need not change when `deferred` arrives.
BACKWARDS = ("fused", "split", "deferred")


def with_backward(schedule: Schedule, backward: str) -> Schedule:
  """The same schedule with its backward pass cut in another way.

  Args:
    schedule: a schedule with fused backward passes, or with none left to cut.
    backward: `fused` leaves every B whole; `split` makes each B an I and the W right after it;
      `deferred` would move every W into a gap.

  Returns:
    The schedule, under the same name.

  Raises:
    ValueError: `backward` is unknown or not available.
  """
  if backward == "deferred":
    raise ValueError('backward="deferred" is not available yet; use "fused" or "split"')
  if backward not in BACKWARDS:
    raise ValueError(f"unknown backward {backward!r}; known: {', '.join(BACKWARDS)}")
  if backward == "fused":
    return schedule
  # Each W directly after its I keeps the order of everything else and the memory of a fused B.
  order = tuple(tuple(part for a in row for part in _halves(a)) for row in schedule.order)
  return dataclasses.replace(schedule, order=order)


def _halves(action: Step) -> Iterator[Step]:
  # A pair stays whole, and a schedule may have split some of its backwards already.
  if not isinstance(action, Action) or action.kind is not Kind.B:
    yield action
    return
  yield Action(action.stage, Kind.I, action.microbatch)
  yield Action(action.stage, Kind.W, action.microbatch)
