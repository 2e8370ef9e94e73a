"""Chimera: two pipelines in opposite directions fill each other's gaps (arXiv:2107.06925).

Li and Hoefler, 2021. Every stage lives twice, on devices d and P-1-d, and each of the pipelines
takes half of the microbatches. P=4, M=4, with a backward that takes as long as a forward:

  device 0 | 0F0 0F2     3F1 3B1 3F3 3B3 0B0     0B2 | peak 3
  device 1 |     1F0 2F1 1F2 2F3 2B1 1B0 2B3 1B2     | peak 4
  device 2 |     1F1 2F0 1F3 2F2 2B0 1B1 2B2 1B3     | peak 4
  device 3 | 0F1 0F3     3F0 3B0 3F2 3B2 0B1     0B3 | peak 3

  microbatch j of a direction, stage s, a pass as the unit of time:
    forward   s + 2j            even and odd times alternate from device to device, so passes of
    backward  2P - 1 - s + 2j   the two directions never meet on one

P microbatches are a unit of 2P passes per device; with more, the next unit begins every 2P and
grows into the end of the one before without a collision (the paper's direct concatenation). With
equal passes and a multiple of P microbatches the bubble is (P-2) / (2M+P-2); devices hold from
P/2+1 (the first and the last) to P microbatches at most. A stage's two replicas need their
gradients summed, and twice the weights. With a backward of two forwards the order is the same: one
unit idles 2P-4 forwards, and every further one P-2 more. The paper's remedies for that, doubled
forwards and halved backwards, are not built here.

The paper numbers the microbatches of a unit one direction after the other, here they alternate.
"""

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.directions import directed_work, index
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def chimera(spec: Spec) -> Schedule:
  """Builds Chimera: merges two 1F1B pipelines by the times that equal passes would have.

  Args:
    spec: devices, an even number, and microbatches, any number.

  Returns:
    The schedule, its backward fused.

  Raises:
    ScheduleError: the number of devices is odd.
  """
  P, M = spec.devices, spec.microbatches
  placement = Placement.mirrored(P, 2)
  # An order by start times is legal, whatever the durations turn out to be: everything that a pass
  # needs has started before it.
  order = tuple(
    tuple(
      Action(stage, kind, m)
      for _, stage, kind, m in sorted(
        (_start(kind, stage, m, P), stage, kind, m)
        for stage, microbatches in lanes.items()
        for m in microbatches
        for kind in (Kind.F, Kind.B)
      )
    )
    for lanes in directed_work(placement, M)
  )
  return Schedule("chimera", placement, M, order)


def _start(kind: Kind, stage: int, microbatch: int, P: int) -> int:
  """Returns the time at which a pass starts if every pass takes one unit of time."""
  unit, j = divmod(index(microbatch), P // 2)
  return 2 * P * unit + 2 * j + (stage if kind is Kind.F else 2 * P - 1 - stage)
