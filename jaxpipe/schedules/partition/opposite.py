"""Partitions two backbones that run in opposite directions (DiffusionPipe: Tian et al., 2024).

A cascaded diffusion model trains two backbones that know nothing of each other. Each device holds
a stage of both, and where one pipeline has its bubbles the other has its work: the order is that of
a bidirectional schedule, with the second replica's stages renamed, for it is another model. P=4:

  device     0      1      2      3
  first      0 ->   1 ->   2 ->   3
  second     7 <-   6 <-   5 <-   4        stage P + s is the second model's stage s: a V

  even microbatches visit 0 ... P-1, odd ones P ... 2P-1, which is what `paths` of a schedule says

Both partitions are found together, because a device is as slow as its two stages are; the order is
kept as it is. This is a plan on paper: simulator, checks and drawings take such a schedule, but the
executor has no step with two models and two losses.
"""

import dataclasses
from collections.abc import Sequence

from jaxpipe.schedules.actions import Action, ScheduleError
from jaxpipe.schedules.build import make_schedule
from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.schedules.partition.orders import FixedOrder
from jaxpipe.schedules.partition.plan import Plan
from jaxpipe.schedules.partition.solve import solve
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import limit_by_device


def two_models(schedule: Schedule) -> Schedule:
  """Turns the second replica of a bidirectional schedule into another model.

  Args:
    schedule: a schedule of S stages on a `mirrored` placement.

  Returns:
    The work on 2S stages that live once, S of each model; microbatches keep their numbers.

  Raises:
    ScheduleError: its stages have no mirrored replicas.
  """
  if schedule.placement.name != "mirrored":
    raise ScheduleError(
      f"{schedule.name} is on {schedule.placement.name}, where stages live once; use chimera,"
      " dualpipe or bitpipe"
    )
  S, chunk = schedule.stages, schedule.placement.chunk

  def renamed(action: Action, d: int) -> Action:
    """Returns an action of device d with the stage's number among 2S."""
    # Odd chunks hold the replica that runs up the devices.
    return dataclasses.replace(action, stage=action.stage + S * (chunk(d, action.stage) % 2))

  # Two models' passes do not overlap: pairs run one after the other.
  order = tuple(
    tuple(renamed(action, d) for step in row for action in step.parts)
    for d, row in enumerate(schedule.order)
  )
  table = [[s + S * (v % 2) for v, s in enumerate(row)] for row in schedule.placement.table]
  ways = (tuple(range(S)), tuple(range(S, 2 * S)))
  paths = tuple(ways[m % 2] for m in range(schedule.microbatches))
  return Schedule(
    f"{schedule.name} of two", Placement.of_table(table), schedule.microbatches, order, paths
  ).check()


def opposite(
  first: Sequence[LayerCost],
  second: Sequence[LayerCost],
  *,
  devices: int,
  microbatches: int,
  schedule: str = "dualpipe",
  hop: float = 0,
  bandwidth: float | None = None,
  memory_limit: float | Sequence[float] | None = None,
  effort: int = 20_000,
) -> Plan:
  """Cuts two models into P stages each, which run through the devices in opposite directions.

  Args:
    first: the layers of the model that runs from device 0 on.
    second: the layers of the one that runs from the last device on.
    devices: number of devices, P, even.
    microbatches: number of each model's microbatches.
    schedule: `dualpipe`, `chimera` or `bitpipe`, whose two replicas become the two models.
    hop: latency of sending between two devices.
    bandwidth: bytes that a link sends in one unit of time; every hop then takes longer by the time
      that the widest boundary of the partition takes. None if sending takes the latency only.
    memory_limit: most that a device may hold of both models, one number or one per device.
    effort: most partitions and beginnings of them that may be looked at.

  Returns:
    The best pair of partitions found, as one of all layers: the second model's stages follow the
    first's.

  Raises:
    ValueError: the sizes do not fit, or no partition fits the limit.
  """
  both = two_models(make_schedule(schedule, devices=devices, microbatches=2 * microbatches))
  return solve(
    lambda hop: FixedOrder(both, hop),
    (first, second),
    limits=limit_by_device(memory_limit, devices),
    hop=hop,
    bandwidth=bandwidth,
    effort=effort,
  )
