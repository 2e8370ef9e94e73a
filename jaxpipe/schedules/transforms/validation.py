"""Adds optimizer post-validation: a step without a barrier (Qi et al., 2023, arXiv:2401.10241).

Clipping by the global norm, or skipping a step whose gradients are not finite, needs a number that
depends on all stages before any of them may step: a barrier at the end of each step, at which the
early devices wait for the late ones. Instead, each stage steps on what the stages before it have
contributed and passes that on (U0); what all have contributed flows back while the next step warms
up, and a stage that turns out to have been too hopeful rolls back and repeats (U1). ZB-H2 on P=3,
M=5, with time for U0 and U1:

  device 0 | F0 F1 F2 F3 F4 U1 I0 W0 I1 W1 I2 W2 I3 W3 I4 W4 U0       | peak 5
  device 1 |    F0 F1 F2 U1 I0 F3 I1 F4 I2 W0 I3 W1 I4 W2 W3 W4 U0    | peak 5
  device 2 |       F0 U1 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 W1 W2 W3 W4 U0 | peak 5

  0U0 -> 1U0 -> 2U0   at the end of each device's list; the last device has the whole
  0U1 <- 1U1 <- 2U1   of the step before, while the next one warms up

U1s stand before the first backward on their device and, so that they cannot dead-lock, no later
than the first backward on any device before it. A U0 waits for the device before, which has ended
earlier where devices end in their order; then each device's span is that of the schedule without
the two, and the next step begins on each device as soon as this one has ended there.
"""

import bisect

from jaxpipe.schedules.actions import Action, Step
from jaxpipe.schedules.kinds import PRODUCTS, Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate


def with_post_validation(schedule: Schedule) -> Schedule:
  """Adds a validation U1 and an optimistic step U0 for every stage.

  Args:
    schedule: a legal schedule whose stages live on one device each, without U.

  Returns:
    The schedule with two more actions per stage. Everything else keeps its order.

  Raises:
    ValueError: stages have replicas, or the schedule has optimizer actions already.

  >>> from jaxpipe.schedules import make_schedule
  >>> with_post_validation(make_schedule("gpipe", devices=2, microbatches=1)).tokens()
  [['0F0', '0U1', '0B0', '0U0'], ['1F0', '1U1', '1B0', '1U0']]
  """
  if schedule.placement.replicated:
    raise ValueError("post-validation needs stages that live on one device each")
  if any(part.kind is Kind.U for row in schedule.order for step in row for part in step.parts):
    raise ValueError("the schedule has optimizer actions already; add post-validation once")
  rows = []
  for held, row, before in zip(
    schedule.placement.table, schedule.order, _warm_ups(schedule), strict=True
  ):
    rows.append((*row[:before], *_all(held, 1), *row[before:], *_all(held, 0)))
  return schedule.with_order(tuple(rows))


def _all(stages: tuple[int, ...], number: int) -> tuple[Step, ...]:
  """Returns the U0s or U1s of some stages."""
  return tuple(Action(stage, Kind.U, number) for stage in sorted(stages))


def _warm_ups(schedule: Schedule) -> list[int]:
  """Returns how many steps of each device come before its U1s.

  Every U1 has a time, that of the first backward on its device or on an earlier one. These times
  do not rise from one device to the next, so that in the order of times each U1 follows those that
  it waits for, and nobody can wait in a circle.
  """
  starts = simulate(schedule).start
  found = []
  time = float("inf")
  for row, times in zip(schedule.order, starts, strict=True):
    backwards = (
      start
      for step, start in zip(row, times, strict=True)
      if any(Kind.I in PRODUCTS[part.kind] for part in step.parts)
    )
    time = min(time, next(backwards, time))
    # Steps that start before that time stay in front of the U1s.
    found.append(bisect.bisect_left(times, time))
  return found
