"""Zero bubble over a V by kind: stage s and stage 2P - 1 - s share a device.

Every stage runs a microbatch on every second cycle, so that the two stages of a device alternate:

    F of stage s, microbatch m on cycle               s     + 2m
    I of stage s, microbatch m on cycle  2P - 1 + (2P-1-s)  + 2m

    cycle      0 1 2 3 4 5 ...           P=2: device 0 has stages 0 and 3, device 1 stages 1 and 2
    device 0   0 . 0 3 0 3 ...
    device 1   . 1 2 1 2 1 ...

W ticks begin with cycle 4P - 4 - j and pause for 2P - 1 cycles when forwards run out. A larger j,
up to P - 2, has W earlier: it holds 3P - 2 - j chunks and takes j W ticks more, so that the time is
[(2M+2P-2)(F+I) + (2M-2P+2+j) W] / 2 for a device's whole F, I and W, where W <= F and I.
"""

from jaxpipe.schedules.by_kind.cycles import Cycles
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import ROUNDING, Spec


def zb_v_by_kind(spec: Spec) -> Schedule:
  """Builds zero bubble over a V by kind, the shortest that a memory limit allows.

  Args:
    spec: devices, microbatches and a memory limit; two stages per device.

  Returns:
    The schedule with its ticks, its backward split. Above the limit if every choice is.
  """
  limits = spec.limits()
  found = None
  for earlier in range(max(1, spec.devices - 1)):
    found = _zb_v(spec, earlier)
    held = peaks(found, spec.memory).memory
    if all(peak <= limit * (1 + ROUNDING) for peak, limit in zip(held, limits, strict=True)):
      break
  assert found is not None
  return found


def _zb_v(spec: Spec, earlier: int) -> Schedule:
  """With W ticks so many cycles earlier; j in the module's docstring."""
  P, M = spec.devices, spec.microbatches
  cycles = Cycles.empty(Placement.v(P), M)
  for m in range(M):
    for s in range(2 * P):
      d = min(s, 2 * P - 1 - s)
      cycles.forward(d, s + 2 * m, s, m)
      cycles.backward(d, 2 * P - 1 + (2 * P - 1 - s) + 2 * m, Kind.I, s, m)
  pause = range(2 * M + P - 2, 2 * M + 3 * P - 3)
  cycles.weight_grads_late({*range(4 * P - 4 - earlier), *pause})
  return cycles.schedule("zb-v")
