"""GPipe: all forwards, then all backwards (Huang et al., 2019, arXiv:1811.06965).

P=3, M=4, with a backward that takes as long as two forwards:

  device 0 | F0 F1 F2 F3                   B0--- B1--- B2--- B3--- | peak 4
  device 1 |    F0 F1 F2 F3          B0--- B1--- B2--- B3---       | peak 4
  device 2 |       F0 F1 F2 F3 B0--- B1--- B2--- B3---             | peak 4

The bubble is (P-1) / (M+P-1) and every device holds all M microbatches. Backwards run first to
last, as in PyTorch. With M=1 this is naive model parallelism.
"""

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def gpipe(spec: Spec) -> Schedule:
  """Builds GPipe: all forwards in order of microbatch, then all backwards in the same order.

  Args:
    spec: devices and microbatches; one stage per device.

  Returns:
    The schedule, its backward fused.
  """
  P, M = spec.devices, spec.microbatches
  # Stage d is all that device d holds, so its list is two runs over the microbatches.
  order = tuple(
    tuple(Action(d, kind, m) for kind in (Kind.F, Kind.B) for m in range(M)) for d in range(P)
  )
  return Schedule("gpipe", Placement.loop(P), M, order)
