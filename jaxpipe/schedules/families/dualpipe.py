"""DualPipe: opposite pipelines whose forwards overlap with each other's backwards.

From DeepSeek-V3 (2024, arXiv:2412.19437) and the `DualPipe` repository. As in Chimera every stage
lives twice, on devices d and P-1-d, and half of the microbatches run each way; what is new is that
a forward of one direction and a backward of the other make a pair, so that the communication of
each hides behind the work of the other. P=4, M=8, `0F6/3B3` being a pair:

  device 0 | 0F0 0F2 0F4 3F1 3I1 3W1 3F3 0F6/3B3----     3F5/0B0---- 3B5----
  device 1 |     1F0 2F1 1F2 2F3 1F4 2B1---- 2F5/1B0---- 1F6/2B3---- 2F7/1B2----
  device 2 |     1F1 2F0 1F3 2F2 1F5 2B0---- 2F4/1B1---- 1F7/2B2---- 2F6/1B3----
  device 3 | 0F1 0F3 0F5 3F0 3I0 3W0 3F2 0F7/3B2----     3F4/0B1---- 3B4----

  device 0 | 3F7/0B2---- 3B7---- 0I4 0W4 0I6 0W6 | peak 5
  device 1 | 2B5---- 1B4----     2I7 1I6 2W7 1W6 | peak 5
  device 2 | 2B4---- 1B5----     2I6 1I7 2W6 1W7 | peak 5
  device 3 | 3F6/0B3---- 3B6---- 0I5 0W5 0I7 0W7 | peak 5

A device's list is that of DualPipeV on half as many devices: its stage near the device's own end
of the pipeline is DualPipeV's near stage, the other direction's is the far one. The bubble is
DualPipeV's as well: the middle devices, which have the most pairs, idle (P/2-1) (FB + B - 3W). A
device holds at most P+1 chunks. The weights are held twice, and a stage's replicas need their
gradients summed.

DeepSeek asks for an even number of 2P or more microbatches. Of an odd number one more runs down,
and with fewer the pattern is cut short, as in DualPipeV.
"""

from jaxpipe.schedules.families.dualpipe_v import dual
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.directions import directed_work
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def dualpipe(spec: Spec) -> Schedule:
  """Builds DualPipe: overlapped pairs of passes of two opposite directions.

  Args:
    spec: devices, an even number, and microbatches, any number.

  Returns:
    The schedule; some of its backwards are fused, some split, as the pattern has them.

  Raises:
    ScheduleError: the number of devices is odd.
  """
  placement = Placement.mirrored(spec.devices, 2)
  work = directed_work(placement, spec.microbatches)
  return dual("dualpipe", placement, work, spec.devices // 2, spec)
