"""Cuts the ticks of a program into loops and straight lines.

One loop over all ticks is the smallest program, but each of its ticks must be ready for whatever
any tick does: a conditional for every kind of action, and an exchange along every route, at which
neighbours wait for one another. A tick that stands alone, or a loop whose body is one period of the
schedule, knows what happens on it: no conditional where all devices do the same, and no exchange
but between devices that have something to send.

    none  one loop over all ticks
    ends  loops over periodic stretches; warm-up, drain and what else is irregular in straight lines
    all   every tick in one straight line

The size of the first two does not depend on the number of microbatches, but for schedules without a
period.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from jaxpipe.pipeline.table.program import Doing, Program
from jaxpipe.schedules import Costs

SHAPES = ("none", "ends", "all")

# A loop must save this many ticks of program to be worth its own overhead.
_LEAST_SAVED = 4
# The longest period that is looked for, in ticks.
_LONGEST_PERIOD = 256
# `auto` compiles no more ticks than this, whatever they would save.
_MOST_TICKS = 64
# What a larger program must save of a step's estimated time.
_LEAST_GAIN = 0.03


@dataclasses.dataclass(frozen=True)
class Segment:
  """A stretch of ticks: `repeats` times a body of `period` ticks.

  Attributes:
    start: first tick.
    period: ticks in the body.
    repeats: 1 where the body is not looped over.
  """

  start: int
  period: int
  repeats: int

  @property
  def stop(self) -> int:
    """The first tick after it."""
    return self.start + self.period * self.repeats

  @property
  def straight(self) -> bool:
    """Whether ticks follow one another with no loop's end between them."""
    return self.period > 1 or self.repeats == 1

  def bodies(self, doing: Sequence[Doing]) -> list[Doing]:
    """What may happen on each tick of the body."""
    mine = doing[self.start : self.stop]
    return [Doing.any_of(mine[i :: self.period]) for i in range(self.period)]


def cut(program: Program, unroll: str) -> tuple[Segment, ...]:
  """Returns the segments of a program, in order.

  Args:
    program: the tick table.
    unroll: `none`, `ends` or `all`; or `auto`, the smallest whose estimated time is within 3 % of
      the best, of those that compile at most 64 ticks.

  Raises:
    ValueError: another `unroll`.
  """
  if unroll not in ("auto", *SHAPES):
    raise ValueError(f"unroll={unroll!r} is unknown; use auto, {', '.join(SHAPES)}")
  if unroll != "auto":
    return _cut(program, unroll)
  shapes = [_cut(program, shape) for shape in SHAPES]
  chosen, least = shapes[0], estimated_time(program, shapes[0])
  for shape in shapes[1:]:
    if sum(segment.period for segment in shape) <= _MOST_TICKS:
      time = estimated_time(program, shape)
      if time < (1 - _LEAST_GAIN) * least:
        chosen, least = shape, time
  return chosen


def estimated_time(
  program: Program,
  segments: Sequence[Segment],
  costs: Costs | None = None,
  *,
  blocking: bool = False,
) -> float:
  """Time of all ticks, when a device goes on as soon as what its tick exchanges has arrived.

  Unlike `simulate`, it knows that a program may exchange where the schedule sends nothing.

  Args:
    program: the tick table.
    segments: its cut.
    costs: of the actions and of a hop; the default, where F, I and W take one unit each.
    blocking: whether a sender waits for its receiver, as CPU devices do.
  """
  costs = costs or Costs()
  durations = tick_durations(program, costs)
  begins, _ = tick_times(program, segments, durations, costs.hop, blocking=blocking)
  return float(begins[-1].max())


def tick_durations(program: Program, costs: Costs) -> np.ndarray:
  """What every device's action takes on every tick, [ticks, P]; 0 where it has none."""
  times = costs.all_durations(program.schedule)
  durations = np.zeros((program.ticks, program.schedule.devices))
  for action, (d, tick) in program.at.items():
    durations[tick, d] = times[action.kind][action.stage]
  return durations


def tick_times(
  program: Program,
  segments: Sequence[Segment],
  durations: np.ndarray,
  hop: float,
  *,
  blocking: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """When each device begins every tick and ends its action there.

  Args:
    program: the tick table.
    segments: its cut.
    durations: [ticks, P], of the actions.
    hop: latency of an exchange between two devices.
    blocking: whether a sender waits for its receiver, as CPU devices do.

  Returns:
    Begins [1 + ticks, P], where the last row is when all of it is over; and ends [ticks, P].
  """
  begins, ends = np.zeros((1 + program.ticks, program.schedule.devices)), np.zeros(durations.shape)
  for segment in segments:
    pairs = [exchanges(body) for body in segment.bodies(program.doing)]
    for tick in range(segment.start, segment.stop):
      sources, targets = pairs[(tick - segment.start) % segment.period]
      ends[tick] = begins[tick] + durations[tick]
      # Of the tick before the first, nothing is sent that anybody waits for.
      sent = ends[tick] if not program.slack else ends[tick - 1] if tick else begins[0]
      begins[tick + 1] = ends[tick]
      np.maximum.at(begins[tick + 1], targets, sent[sources] + hop)
      if blocking:
        np.maximum.at(begins[tick + 1], sources, sent[targets] + hop)
  return begins, ends


def exchanges(doing: Doing) -> tuple[np.ndarray, np.ndarray]:
  """Senders and receivers of all that a tick sends between two devices."""
  pairs = [pair for route in doing.pairs for pair in route if pair[0] != pair[1]]
  sources, targets = np.array(pairs, int).reshape(-1, 2).T
  return sources, targets


def _cut(program: Program, shape: str) -> tuple[Segment, ...]:
  if shape == "none":
    return (Segment(0, 1, program.ticks),)
  if shape == "all":
    return (Segment(0, program.ticks, 1),)
  numbers: dict[Hashable, int] = {}
  ids = np.array([numbers.setdefault(tick, len(numbers)) for tick in program.doing])
  return tuple(_loops(ids, 0))


def _loops(ids: np.ndarray, start: int) -> Iterator[Segment]:
  """The stretch that saves most becomes a loop; then the same on both sides of it."""
  found = max(_stretches(ids), key=lambda s: s.period * (s.repeats - 1), default=None)
  if found is None or found.period * (found.repeats - 1) < _LEAST_SAVED:
    if len(ids):
      yield Segment(start, len(ids), 1)
    return
  yield from _loops(ids[: found.start], start)
  yield Segment(start + found.start, found.period, found.repeats)
  yield from _loops(ids[found.stop :], start + found.stop)


def _stretches(ids: np.ndarray) -> Iterator[Segment]:
  """For every period, the longest stretch that has it; short periods first."""
  for period in range(1, min(len(ids) // 2, _LONGEST_PERIOD) + 1):
    same = np.concatenate([[0], ids[:-period] == ids[period:], [0]])
    edges = np.flatnonzero(np.diff(same))
    starts, stops = edges[::2], edges[1::2]
    if len(starts):
      longest = int(np.argmax(stops - starts))
      repeats = 1 + int(stops[longest] - starts[longest]) // period
      yield Segment(int(starts[longest]), period, repeats)
