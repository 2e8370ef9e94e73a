"""1F1B: one forward, one backward (PipeDream-Flush: Narayanan et al., 2021, arXiv:2006.09503).

P=3, M=4, with a backward that takes as long as two forwards:

  device 0 | F0 F1 F2             B0--- F3 B1---    B2---    B3--- | peak 3
  device 1 |    F0 F1       B0--- F2 B1--- F3 B2---    B3---       | peak 2
  device 2 |       F0 B0--- F1 B1--- F2 B2--- F3 B3---             | peak 1

  device d:  | P-d-1 forwards | F B pairs ...... | the backwards left over |
             [1] warm-up        [2] steady         [3] drain

The bubble is GPipe's, (P-1) / (M+P-1), but device d holds only min(P-d, M) microbatches.
"""

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def one_f_one_b(spec: Spec) -> Schedule:
  """Builds 1F1B: just enough forwards to reach the last device and back, then in turn.

  Args:
    spec: devices and microbatches; one stage per device.

  Returns:
    The schedule, its backward fused.
  """
  P, M = spec.devices, spec.microbatches
  # P-d-1 stages follow device d: so many forwards leave it before the first gradient can come back.
  # With M < P there are not that many, and it warms up with all of them.
  order = tuple(_device(d, min(P - d - 1, M), M) for d in range(P))
  return Schedule("1f1b", Placement.loop(P), M, order)


def _device(d: int, ahead: int, M: int) -> tuple[Action, ...]:
  """Returns device d's list: forwards stay `ahead` of backwards until they run out."""
  # With one chunk a device, stage d is on device d.
  warm_up = [Action(d, Kind.F, m) for m in range(ahead)]  # [1]
  # [2] F first: the device then holds ahead + 1 microbatches, its peak.
  steady = [
    action
    for m in range(M - ahead)
    for action in (Action(d, Kind.F, ahead + m), Action(d, Kind.B, m))
  ]
  drain = [Action(d, Kind.B, m) for m in range(M - ahead, M)]  # [3]
  return tuple(warm_up + steady + drain)
