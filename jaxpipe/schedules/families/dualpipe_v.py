"""DualPipeV: DualPipe cut in half, one V instead of two opposite pipelines.

The order is that of DeepSeek's DualPipeV (the `DualPipe` repository, 2025; DualPipe itself:
DeepSeek-V3, 2024, arXiv:2412.19437). Forwards and backwards run as overlapped pairs, so that the
communication of one hides behind the other's work. P=2, M=4, `0F3/3B1` being a pair:

  device 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3/3B1----     3F2/0B0---- 3B2----
  device 1 |     1F0 2F0 1F1 2F1 1F2 2B0---- 2F2/1B0---- 1F3/2B1---- 2F3/1B1----

  device 0 | 3F3/0B1---- 3B3---- 0I2 0W2 0I3 0W3 | peak 5
  device 1 | 2B2---- 1B2----     2I3 1I3 2W3 1W3 | peak 5

Device r of P holds stage r, near the model's ends, and stage 2P-1-r, far from them. In the order of
its list, f and b being forwards and backwards, i and w the halves of a backward:

  [1] f near           2(P-r-1)   far forwards cannot have come yet
  [2] f near, f far    r+1
  [3] i w f far        P-r-1      gradients leave early, weight gradients fill the wait
  [4] near/far pairs   M-2P+r+1   forward near with backward far, then the other way round
  [5] b far, far/near  P-r-1      near forwards have run out
  [6] b far, b near    r+1        from the middle on without w, which is put off
  [7] w, i near        P-r-1
  [8] w                what is left

A pair is one step: it starts when both of its inputs are there, and both outputs come at its end.
With FB the time of a pair, the device with the most pairs, the last, idles (P-1) (FB + B - 3W), the
formula that DeepSeek publishes; here that is exact for M of 2P and more wherever F = I and a pair
takes no less than two forwards. A device holds at most 2P+1 chunks.

The pattern needs 2P microbatches. With fewer, those are left out that do not exist, or, if that is
sooner done at the given costs, there are no pairs and devices run whatever is most urgent.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from jaxpipe.schedules.actions import Action, Order, Overlap, Step
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.lanes import Work
from jaxpipe.schedules.planning.list_schedule import Policy, all_work, list_schedule
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate
from jaxpipe.schedules.spec import Spec

_NEAR, _FAR = range(2)
# One pass of a device: _NEAR or _FAR, the kind, and the position among that stage's microbatches.
_Pass = tuple[int, Kind, int]


def dualpipe_v(spec: Spec) -> Schedule:
  """Builds DualPipeV: overlapped pairs of passes over a V.

  Args:
    spec: devices and microbatches, any numbers of them.

  Returns:
    The schedule; some of its backwards are fused, some split, as the pattern has them.
  """
  placement = Placement.v(spec.devices)
  work = all_work(placement, spec.microbatches)
  return dual("dualpipe-v", placement, work, spec.devices, spec)


def dual(name: str, placement: Placement, work: Work, ranks: int, spec: Spec) -> Schedule:
  """Builds the pattern on any placement in which every device holds one near and one far stage.

  Args:
    name: name of the schedule.
    placement: where the stages live; of the two stages of a device, the lower one is near, and its
      number is the device's rank in the pattern.
    work: for each device, the microbatches that it runs on each of its stages.
    ranks: number of devices of one pattern, from the outermost to the innermost.
    spec: sizes, and the costs by which a pattern without pairs is compared.

  Returns:
    The schedule.
  """
  M = spec.microbatches
  most = max(len(lane) for lanes in work for lane in lanes.values())
  # A pattern for more microbatches than there are stays legal when the rest is left out.
  pattern = [_passes(min(lanes), ranks, max(most, 2 * ranks)) for lanes in work]
  order = tuple(map(_row, pattern, work))
  schedule = Schedule(name, placement, M, order)
  if most >= 2 * ranks:
    return schedule
  other = Schedule(name, placement, M, _without_pairs(placement, work, ranks, spec))
  return min(schedule, other, key=lambda s: simulate(s, spec.costs).makespan)


def _row(pattern: list[tuple[_Pass, ...]], lanes: Mapping[int, Sequence[int]]) -> tuple[Step, ...]:
  """Turns the passes of one device into steps, without those of microbatches that do not exist."""
  stages = sorted(lanes)
  row: list[Step] = []
  for passes in pattern:
    actions = [
      Action(stages[side], kind, lanes[stages[side]][i])
      for side, kind, i in passes
      if i < len(lanes[stages[side]])
    ]
    row += [Overlap(*actions)] if len(actions) == 2 else actions
  return tuple(row)


class _Device:
  """The list of one device as it grows: every call of a method appends one step."""

  def __init__(self) -> None:
    self.steps: list[tuple[_Pass, ...]] = []
    self.pending: deque[_Pass] = deque()
    self._counts = {(side, kind): 0 for side in (_NEAR, _FAR) for kind in (Kind.F, Kind.B)}

  def run(self, *passes: tuple[int, Kind]) -> None:
    """Appends a pass, or an overlapped pair of passes; the W of an I is noted as pending."""
    step = []
    for side, kind in passes:
      counted = Kind.F if kind is Kind.F else Kind.B
      i = self._counts[side, counted]
      self._counts[side, counted] += 1
      step.append((side, kind, i))
      if kind is Kind.I:
        self.pending.append((side, Kind.W, i))
    self.steps.append(tuple(step))

  def weight(self) -> None:
    """Appends the W that has been pending longest."""
    self.steps.append((self.pending.popleft(),))


def _passes(r: int, P: int, M: int) -> list[tuple[_Pass, ...]]:
  """Returns the pattern of rank r of P, for at least 2P microbatches."""
  F, I, B = Kind.F, Kind.I, Kind.B
  device = _Device()
  run = device.run
  for _ in range(2 * (P - r - 1)):  # [1]
    run((_NEAR, F))
  for _ in range(r + 1):  # [2]
    run((_NEAR, F))
    run((_FAR, F))
  for _ in range(P - r - 1):  # [3]
    run((_FAR, I))
    device.weight()
    run((_FAR, F))
  for n in range(M - 2 * P + r + 1):  # [4]
    if n == 0 and r == P - 1:
      # All others wait for the first gradients, which a pair would hold back.
      run((_NEAR, F))
      run((_FAR, B))
    else:
      run((_NEAR, F), (_FAR, B))
    run((_FAR, F), (_NEAR, B))
  for _ in range(P - r - 1):  # [5]
    run((_FAR, B))
    run((_FAR, F), (_NEAR, B))
  for n in range(2 * (r + 1)):  # [6]
    run((_NEAR if n % 2 else _FAR, B if n <= r else I))
  for _ in range(P - r - 1):  # [7]
    device.weight()
    run((_NEAR, I))
  while device.pending:  # [8]
    device.weight()
  return device.steps


def _without_pairs(placement: Placement, work: Work, ranks: int, spec: Spec) -> Order:
  """Plans F, I and W without pairs: I before F before W, within the pattern's memory."""

  def urgency(kind: Kind, stage: int, microbatch: int) -> float:
    """Ranks every I before every F, and W last."""
    if kind is Kind.W:
      return math.inf
    return microbatch + (spec.microbatches if kind is Kind.F else 0)

  policy = Policy(urgency=urgency)
  return list_schedule(placement, work, policy, costs=spec.costs, limit=2 * ranks + 1)
