"""List scheduling of fused backward passes: the planner of Hanayo and BitPipe.

`list_schedule` plans F, I and W. Here I takes the time of I and W together and hands its gradient
on at its end, W takes no time and follows at once, and the two become one B. P=2, M=3, forwards and
backwards of a microbatch as urgent as its number says:

  device 0 | F0 F1 F2    B0---    B1---    B2--- | peak 3
  device 1 |    F0 B0--- F1 B1--- F2 B2---       | peak 1
"""

import dataclasses
from collections.abc import Sequence

from jaxpipe.schedules.actions import Action, Order
from jaxpipe.schedules.costs import Costs, memory_changes
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.lanes import Work
from jaxpipe.schedules.planning.list_schedule import Policy, Urgency, list_schedule
from jaxpipe.schedules.spec import Spec


def fused_list_schedule(
  placement: Placement,
  work: Work,
  spec: Spec,
  urgency: Urgency,
  *,
  in_flight: Sequence[int] | None = None,
  wait: bool = False,
) -> Order:
  """Schedules F and B of every microbatch on every stage, greedily in time.

  Args:
    placement: where the stages live.
    work: for each device and each of its stages, its microbatches in order.
    spec: costs to plan with, and the memory limit to keep to.
    urgency: urgency by (kind, stage, microbatch), asked for F, and for I and W as parts of a B;
      smaller goes first.
    in_flight: most microbatches that a stage may hold, by stage; None for no bound.
    wait: whether a device waits up to one forward for something more urgent that is to come.

  Returns:
    Each device's list.

  Raises:
    ValueError: a limit is too low for one microbatch.
  """
  times = spec.costs.durations(placement.stages)
  policy = Policy(
    urgency=urgency,
    in_flight=in_flight,
    patience=min(times[Kind.F]) if wait else 0,
    # Every W runs as soon as its I has, whatever else is urgent.
    pending=1,
  )
  changes = memory_changes(spec.memory, placement.stages)
  order = list_schedule(
    placement,
    work,
    policy,
    costs=_fused(spec.costs, times[Kind.B]),
    memory=(changes[Kind.F], changes[Kind.B], 0),
    limit=None if spec.memory_limit is None else spec.limits(),
  )
  return tuple(
    tuple(
      Action(a.stage, Kind.B, a.microbatch) if a.kind is Kind.I else a
      for step in row
      for a in step.parts
      if a.kind is not Kind.W
    )
    for row in order
  )


def _fused(costs: Costs, backward: tuple[float, ...]) -> Costs:
  """Returns costs whose I takes the time of a whole backward, and W none."""
  return dataclasses.replace(costs, input_grad=backward, weight_grad=0)
