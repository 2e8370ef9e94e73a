"""Interleaved 1F1B: several chunks per device (Narayanan et al., 2021, arXiv:2104.04473).

P=2, V=2, M=2, with a backward that takes as long as two forwards:

  device 0 | 0F0 0F1 2F0 2F1         2B0----     2B1---- 0B0---- 0B1---- | peak 4
  device 1 |     1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1----         | peak 3

  forwards run in rounds of P microbatches:  chunk 0: m 0 1 .. P-1 | chunk 1: m 0 1 .. P-1 | ...
  backwards run in the same rounds, last chunk first
  device d warms up with (V-1) P + 2 (P-d-1) forwards, then alternates, then drains

The model goes round the ring V times, so filling and draining take 1/V of 1F1B's time: the bubble
is (P-1) / (VM+P-1), or (P-1) / (VM) of the ideal time as the paper counts. It costs V times the
traffic, and the first device holds 1 + (P-1) / (PV) times 1F1B's activations.

The paper asks for a multiple of P microbatches. Here they are dealt to max(1, M // P) rounds, the
longer rounds first where they cannot be equal; PyTorch has the same rounds, but only equal ones.
With V=1 the warm-up is still twice 1F1B's, as in PyTorch, and so is nearly the memory: that is
eager 1F1B (Zhuang et al., 2022, arXiv:2211.05322), which leaves a tick between what a device sends
and what comes back for it.
"""

import dataclasses

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def interleaved_1f1b(spec: Spec) -> Schedule:
  """Builds interleaved 1F1B: 1F1B over chunks, in rounds of about P microbatches.

  Args:
    spec: devices, microbatches and chunks, any numbers of them.

  Returns:
    The schedule, its backward fused.
  """
  P, M, V = spec.devices, spec.microbatches, spec.chunks
  placement = Placement.loop(P, V)
  order = tuple(
    _device(round_robin(placement.table[d], M, P), warm_up(spec, d, 2)) for d in range(P)
  )
  return Schedule("interleaved-1f1b", placement, M, order)


def eager_1f1b(spec: Spec) -> Schedule:
  """Builds eager 1F1B: one chunk, and up to 2 (P - d) - 1 microbatches in flight on device d."""
  return dataclasses.replace(interleaved_1f1b(spec), name="eager-1f1b")


# What a device does, in order: stage and microbatch of its forwards, and of its backwards.
Passes = tuple[list[tuple[int, int]], list[tuple[int, int]]]


def round_robin(stages: tuple[int, ...], M: int, P: int) -> Passes:
  """Lists the forwards and the backwards of one device, each as (stage, microbatch) in order.

  Args:
    stages: the stages that the device holds, in chunk order.
    M: number of microbatches.
    P: number of devices, the least that a round holds if there are as many microbatches.

  Returns:
    The forwards, then the backwards.
  """
  spans = rounds(M, P)
  forwards = [(s, m) for span in spans for s in stages for m in span]
  backwards = [(s, m) for span in spans for s in stages[::-1] for m in span]
  return forwards, backwards


def warm_up(spec: Spec, d: int, per_hop: int) -> int:
  """Counts the forwards that a device runs before it alternates.

  Args:
    spec: devices, microbatches and chunks.
    d: the device.
    per_hop: forwards for each of the devices after it, on top of those of its earlier chunks.
  """
  # The longest round decides: the last chunk's backward of any round waits for all earlier chunks'
  # forwards of that round, and alternating never catches up on them.
  longest = len(rounds(spec.microbatches, spec.devices)[0])
  ahead = (spec.chunks - 1) * longest + per_hop * (spec.devices - d - 1)
  return min(ahead, spec.microbatches * spec.chunks)


def rounds(M: int, P: int) -> list[range]:
  """Deals M microbatches to rounds of at least P, as evenly as possible and the longer first."""
  count = max(1, M // P)
  size, longer = divmod(M, count)
  # Round r begins after r rounds, of which up to `longer` had one microbatch more.
  begins = [r * size + min(r, longer) for r in range(count + 1)]
  return [range(begins[r], begins[r + 1]) for r in range(count)]


def _device(passes: Passes, ahead: int) -> tuple[Action, ...]:
  """Forwards stay `ahead` of backwards until they run out."""
  forwards = [Action(s, Kind.F, m) for s, m in passes[0]]
  backwards = [Action(s, Kind.B, m) for s, m in passes[1]]
  row = forwards[:ahead]
  # The ranges differ in length by `ahead`; what is left of the backwards is the drain.
  for forward, backward in zip(forwards[ahead:], backwards, strict=False):
    row += (forward, backward)
  return (*row, *backwards[len(forwards) - ahead :])
