"""Two pipelines in opposite directions: which microbatch takes which.

In a `mirrored` placement the even chunks hold the replica that runs down the devices and the odd
ones the replica that runs up. Even microbatches run down and odd ones up, so that the pipelines
stay level however many there are, and of an odd number one more runs down.
"""

from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.list_schedule import Work


def directed_work(placement: Placement, microbatches: int) -> Work:
  """What each device runs: for each of its stages, the microbatches of that chunk's direction."""
  return [
    {stage: range(chunk % 2, microbatches, 2) for chunk, stage in enumerate(row)}
    for row in placement.table
  ]


def index(microbatch: int) -> int:
  """The how-manieth of its direction a microbatch is."""
  return microbatch // 2
