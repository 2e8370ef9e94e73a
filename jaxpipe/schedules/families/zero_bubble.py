"""ZB-H1 and ZB-H2: weight gradients fill 1F1B's gaps (Qi et al., 2023, arXiv:2401.10241).

Nobody waits for a weight gradient W, so it may run late: in the drain, where 1F1B idles. Each
device keeps some of them back for that. P=3, M=6, all three passes of equal length:

ZB-H1
  device 0 | F0 F1 F2       I0 W0 F3 I1 W1 F4 I2 W2 F5 I3 W3 I4 W4 I5 W5 | peak 3
  device 1 |    F0 F1    I0 F2 I1 W0 F3 I2 W1 F4 I3 W2 F5 I4 W3 I5 W4 W5 | peak 3
  device 2 |       F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 F5 I5 W3 W4 W5 | peak 3

ZB-H2
  device 0 | F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5       | peak 5
  device 1 |    F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 I4 W2 I5 W3 W4 W5    | peak 5
  device 2 |       F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 W2 W3 W4 W5 | peak 5

              | warm-up of device d  | weight gradients kept back | bubble, M >= 2P-1
  1F1B        | P-d-1 forwards       | none                       | (P-1) (F + I + W)
  ZB-H1       | P-d-1 forwards       | d                          | (P-1) (F + I - W)
  ZB-H2       | 2 (P-d-1) forwards   | 2d                         | (P-1) (F + I - 2W)

The bubble is that of the longest device, first start to last end; it holds while it is not
negative and W takes no longer than F or I. Over the makespan nothing beats ZB-H1 at equal times:
its last device, which starts P-1 forwards late, never idles. Every device holds up to P
microbatches with ZB-H1, 2P-1 with ZB-H2.

ZB-H1 with several chunks per device is PyTorch's interleaved zero bubble: the rounds of interleaved
1F1B with half of its warm-up. The paper has H1 and H2 with one chunk only.
"""

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.families.interleaved import Passes, round_robin, warm_up
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def zb_h1(spec: Spec) -> Schedule:
  """Builds ZB-H1: 1F1B's memory, where device d keeps back up to d weight gradients.

  Args:
    spec: devices, microbatches and chunks, any numbers of them.

  Returns:
    The schedule, its backward split.
  """
  return _zero_bubble("zb-h1", spec, 1)


def zb_h2(spec: Spec) -> Schedule:
  """Builds ZB-H2: twice 1F1B's memory and warm-up, up to 2d weight gradients kept back.

  Args:
    spec: devices and microbatches; one stage per device.

  Returns:
    The schedule, its backward split.
  """
  return _zero_bubble("zb-h2", spec, 2)


def _zero_bubble(name: str, spec: Spec, depth: int) -> Schedule:
  """Builds either; `depth` is the forwards per hop of the warm-up, and the Ws kept per device."""
  P, M = spec.devices, spec.microbatches
  placement = Placement.loop(P, spec.chunks)
  order = tuple(
    _device(round_robin(placement.table[d], M, P), warm_up(spec, d, depth), depth * d)
    for d in range(P)
  )
  return Schedule(name, placement, M, order)


def _device(passes: Passes, ahead: int, kept: int) -> tuple[Action, ...]:
  """Returns a device's list: F stays `ahead` of input gradients, and W `kept` behind them."""
  forwards, backwards = passes
  weights = [Action(s, Kind.W, m) for s, m in backwards]
  row = [Action(s, Kind.F, m) for s, m in forwards[:ahead]]
  for i, (stage, m) in enumerate(backwards):
    # [1] steady: forward first, as in 1F1B; later, in the drain, there are none left.
    row += (Action(s, Kind.F, n) for s, n in forwards[ahead + i : ahead + i + 1])
    row.append(Action(stage, Kind.I, m))
    if i >= kept:
      row.append(weights[i - kept])
  # [2] What was kept back fills the time in which earlier devices still drain.
  return (*row, *weights[max(0, len(weights) - kept) :])
