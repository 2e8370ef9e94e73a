"""Assigns microbatches to the two pipelines of a bidirectional schedule.

In a `mirrored` placement the even chunks hold the replica that runs down the devices and the odd
ones the replica that runs up. Even microbatches run down and odd ones up, so that the pipelines
stay level however many there are, and of an odd number one more runs down.
"""

from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.lanes import Work


def directed_work(placement: Placement, microbatches: int) -> Work:
  """Returns the work of all devices: on each stage, the microbatches of that chunk's direction.

  Args:
    placement: a `mirrored` placement.
    microbatches: number of microbatches, M, of both directions together.

  Returns:
    For each device and each of its stages, its microbatches in order.
  """
  return [
    {stage: range(chunk % 2, microbatches, 2) for chunk, stage in enumerate(row)}
    for row in placement.table
  ]


def index(microbatch: int) -> int:
  """Returns the position of a microbatch among those of its direction, from 0."""
  return microbatch // 2
