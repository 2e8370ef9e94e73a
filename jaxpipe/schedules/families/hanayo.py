"""Hanayo: the model goes down and up the devices in W waves (Liu et al., 2023, arXiv:2308.15762).

P=2, one wave (V=2), M=2, with a backward that takes as long as two forwards:

  device 0 | 0F0 0F1     3F0 3B0---- 3F1 3B1----     0B0----         0B1---- | peak 3
  device 1 |     1F0 2F0 1F1 2F1     2B0---- 1B0---- 2B1---- 1B1----         | peak 4

  forwards   microbatch j enters stage s at s + 2j: two waves that cross on a device never collide
  backwards  the same at half the speed, from the end of microbatch 0's last forward on

The turns of a wave stay on their device, so 2W chunks cost 2W - 1 transfers fewer than a loop has,
and no stage is held twice. With M = P, a backward of two forwards and no hops, the paper's bubble
is (2P-2) / (3PW+P-1). The plan above takes 6PW + 4(P-1) forwards of time, which is as soon as the
last microbatch can follow the first, and its bubble is (2P-2) / (3PW+2P-2), never more.

For M <= P the devices follow that plan: of what has arrived, or is about to, they take what it has
first. Beyond that the plan would repeat with a gap between its rounds. There each device runs what
is furthest ahead on its way, and a stage with r stages from it to the end holds at most 2r/V + P/4
microbatches. So neither idle time nor memory grows with M. For multiples of P from 2P to 8P:

  P, V               2, 2   4, 2   4, 4   8, 2   8, 4
  forwards idle        3      9      9     23     24    at most, on any device
  chunks held          7     11     22     21     42    at most; with M = P it is PV
"""

from collections.abc import Sequence

from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.fused_list import fused_list_schedule
from jaxpipe.schedules.planning.list_schedule import Urgency, all_work
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def hanayo(spec: Spec) -> Schedule:
  """Builds Hanayo: waves over the devices, planned as F and B for the given costs.

  Args:
    spec: devices, microbatches and an even number of chunks, or the option `waves`, half of it.

  Returns:
    The schedule, its backward fused.

  Raises:
    ValueError: the number of chunks is odd or contradicts `waves`, or the memory limit is too low.
  """
  P, M, V = spec.devices, spec.microbatches, _chunks(spec)
  placement = Placement.wave(P, V)
  S = placement.stages
  work = all_work(placement, M)
  if M <= P:
    urgency = wave_urgency(S, [(0, m) for m in range(M)])
    order = fused_list_schedule(placement, work, spec, urgency, wait=True)
  else:
    in_flight = [-(-(8 * (S - s) + P * V) // (4 * V)) for s in range(S)]
    order = fused_list_schedule(placement, work, spec, _steady(S), in_flight=in_flight)
  return Schedule("hanayo", placement, M, order)


def _chunks(spec: Spec) -> int:
  """Returns V, from the option `waves` where it is given."""
  waves, V = spec.options.get("waves"), spec.chunks
  # The family's default stands for "not given".
  if waves is not None and V not in (2, 2 * waves):
    raise ValueError(
      f"waves={waves} needs {2 * waves} chunks per device, not {V}; use chunks={2 * waves}"
    )
  if waves is not None:
    return 2 * waves
  if V % 2:
    raise ValueError(
      f"hanayo needs 2 chunks per device and wave, not {V} in all; use chunks={V + 1}"
    )
  return V


def wave_urgency(S: int, places: Sequence[tuple[int, int]]) -> Urgency:
  """Makes a pass as urgent as its time in the plan of a wave, in halves of a forward.

  Args:
    S: number of stages.
    places: for every microbatch, the time at which its round begins and its number in the round.

  Returns:
    The urgency of a pass by (kind, stage, microbatch); smaller is more urgent.
  """
  # As if a forward took 1.5 times as long: where the last forwards meet the first backwards, they
  # then take turns as the backwards need them.
  forward = [begin + 6 * j for begin, j in places]
  backward = [begin + 3 * S + 4 * (S - 1) + 8 * j for begin, j in places]

  def urgency(kind: Kind, stage: int, microbatch: int) -> float:
    """Counts 3 halves of a forward for each stage forwards, and 4 for each stage backwards."""
    if kind is Kind.F:
      return forward[microbatch] + 3 * stage
    return backward[microbatch] - 4 * stage

  return urgency


def _steady(S: int) -> Urgency:
  """Makes the pass that is furthest ahead on its way the most urgent one."""

  # A forward is as urgent as the backward that ends a microbatch half its number earlier.
  def urgency(kind: Kind, stage: int, microbatch: int) -> float:
    """Counts microbatches for F, and for B the stages left and two for each microbatch."""
    return microbatch if kind is Kind.F else S - 1 - stage + 2 * microbatch

  return urgency
