"""Ticks by kind where stages lie in a loop: one after the other round the devices.

A *turn* is one chunk and microbatch; all devices take the same turns, device d each of them d
cycles later than device 0, and backwards in the opposite direction. P=2, V=2, M=4:

    cycle          0  1  2  3  4  5  6  7  8 ...    turns, forward    0 1 | 2 3 | 4 5 | 6 7
    device 0   F   0  1  2  3  4  5  6  7           chunk             0 0   1 1   0 0   1 1
               B               0  1  2  3  4 ...    microbatch        0 1   0 1   2 3   2 3
    device 1   F      0  1  2  3  4  5  6  7
               B            0  1  2  3  4  5 ...    backward: the same with chunks reversed

    F of turn k of device d on cycle          d         + k
    B of turn k of device d on cycle  off + (P - 1 - d) + k

`off` is the least for which the last stage has run every forward before its backward. With the
turns of interleaved 1F1B and P a divisor of M, the time is (MV + P - 1)(f + b), f and b being those
of one chunk: Megatron's ideal, whatever they are. With V=1 the same order is known as eager 1F1B
(Zhuang et al., 2022, arXiv:2211.05322): 2 (P - d) - 1 microbatches in flight on device d.

Zero bubble (Qi et al., 2023, arXiv:2401.10241) by kind is the same with a split backward. There is
a W tick on every cycle but before device 0 has anything to do on it, and for P - 1 cycles when
forwards have run out: what is left fills the drain.
"""

from collections.abc import Sequence

from jaxpipe.schedules.by_kind.cycles import Cycles
from jaxpipe.schedules.families.interleaved import rounds
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec

# Chunk and microbatch; None for a turn on which nothing runs.
Turns = Sequence[tuple[int, int] | None]


def interleaved_by_kind(spec: Spec) -> Schedule:
  """Builds interleaved 1F1B in cycles of one F tick and one B tick.

  Args:
    spec: any numbers of devices, microbatches and chunks.

  Returns:
    The schedule with its ticks. Its lists are those of `interleaved-1f1b` where P divides M.
  """
  return _in_rounds("interleaved-1f1b", spec)


def eager_by_kind(spec: Spec) -> Schedule:
  """Builds eager 1F1B in cycles of one F tick and one B tick; see `interleaved_by_kind`."""
  return _in_rounds("eager-1f1b", spec)


def zero_bubble_by_kind(spec: Spec) -> Schedule:
  """Builds zero bubble over a loop by kind, in (V+1) P - 1 chunks on device 0.

  Args:
    spec: any numbers of devices, microbatches and chunks.

  Returns:
    The schedule with its ticks, its backward split. Where W is no longer than F and I, no order
    over a loop is shorter.
  """
  return _in_rounds("zb-h1", spec, "deferred")


def gpipe_by_kind(spec: Spec) -> Schedule:
  """Builds GPipe on F ticks, then B ticks."""
  return _in_phases("gpipe", spec, reverse=False)


def looped_bfs_by_kind(spec: Spec) -> Schedule:
  """Builds looped BFS on F ticks, then B ticks, microbatches backwards from the last."""
  return _in_phases("looped-bfs", spec, reverse=True)


def _in_rounds(name: str, spec: Spec, backward: str | None = None) -> Schedule:
  """Turns in rounds of at least P microbatches, forwards and backwards side by side."""
  P, M, V = spec.devices, spec.microbatches, spec.chunks
  spans = rounds(M, P)
  forwards = _turns(spans, range(V), P)
  backwards = _turns(spans, range(V)[::-1], P)
  # The last stage's B of a microbatch comes after its F, maybe on the same cycle.
  at = {turn: k for k, turn in enumerate(forwards)}
  off = max(P - 1 + at[turn] - k for k, turn in enumerate(backwards) if turn and turn[0] == V - 1)
  return _placed(name, spec, forwards, backwards, off, backward or spec.backward)


def _in_phases(name: str, spec: Spec, reverse: bool) -> Schedule:
  """All forwards, chunk by chunk, then all backwards."""
  P, M, V = spec.devices, spec.microbatches, spec.chunks
  forwards = _turns([range(M)], range(V), P)
  backwards = _turns([range(M)[::-1] if reverse else range(M)], range(V)[::-1], P)
  off = len(forwards) + P - 1  # after the last forward of all
  return _placed(name, spec, forwards, backwards, off, spec.backward)


def _turns(spans: Sequence[Sequence[int]], chunks: Sequence[int], P: int) -> Turns:
  """Round by round, chunk by chunk; a chunk has at least P turns, of which some may be empty.

  A chunk's first microbatch returns to device 0 after P cycles.
  """
  return [
    (v, span[i]) if i < len(span) else None
    for span in spans
    for v in chunks
    for i in range(max(P, len(span)))
  ]


def _placed(
  name: str, spec: Spec, forwards: Turns, backwards: Turns, off: int, backward: str | None
) -> Schedule:
  """Puts turns on cycles, and weight gradients where `backward` wants them."""
  P, n = spec.devices, len(forwards)
  placement = Placement.loop(P, spec.chunks)
  cycles = Cycles.empty(placement, spec.microbatches)
  kind = Kind.B if backward in (None, "fused") else Kind.I
  for d, stages in enumerate(placement.table):
    for k, turn in enumerate(forwards):
      if turn:
        cycles.forward(d, d + k, stages[turn[0]], turn[1])
    for k, turn in enumerate(backwards):
      if turn:
        cycles.backward(d, off + (P - 1 - d) + k, kind, stages[turn[0]], turn[1])
  if backward == "split":
    cycles.weight_grads_at_once()
  elif kind is Kind.I:
    cycles.weight_grads_late({*range(off + P - 1), *range(n - 1, n + P - 2)})
  return cycles.schedule(name)
