"""Divides the ticks of a program into loops and straight lines of compiled code.

One loop over all ticks is the smallest program, but each of its ticks must be ready for whatever
any tick does: a conditional for every kind of action, and an exchange along every route, at which
neighbours wait for one another. A tick that stands alone, or a loop whose body is one period of the
schedule, knows what happens on it: no conditional where all devices do the same, and no exchange
but between devices that have something to send. Three shapes of program are offered:

    none  one loop over all ticks
    ends  loops over periodic stretches; warm-up, drain and what else is irregular in straight lines
    all   every tick in one straight line

`ends` of 1F1B on 4 devices with 8 microbatches; a row is a device, a column a tick:

    F F F F . . .|B F B F B F B F|B . B . B . B
    . F F F . . B|F B F B F B F B|F B . B . B .
    . . F F . B F|B F B F B F B F|B F B . B . .
    . . . F B F B|F B F B F B F B|F B F B . . .
    straight      2 ticks, 4 times straight

The size of the first two does not depend on the number of microbatches, except for schedules
without a period.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np

from jaxpipe.pipeline.table.program import Program
from jaxpipe.pipeline.table.segment import Segment
from jaxpipe.pipeline.table.tick_times import estimated_time

SHAPES = ("none", "ends", "all")

# A loop must save this many ticks of program to be worth its own overhead.
_LEAST_SAVED = 4
# The longest period that is looked for, in ticks.
_LONGEST_PERIOD = 256
# `auto` compiles no more ticks than this, whatever they would save: compile time grows with them.
_MOST_TICKS = 64
# The share of a step's estimated time that a larger program must save to be taken.
_LEAST_GAIN = 0.03


def segments(program: Program, unroll: str) -> tuple[Segment, ...]:
  """Divides the ticks of a program into segments.

  Args:
    program: the tick table.
    unroll: `none`, `ends` or `all`; or `auto`: from `none` on, the next larger program takes the
      place of the one chosen so far if it compiles at most 64 ticks and saves at least 3 % of its
      estimated time, every action taken to last one unit and a transfer none.

  Returns:
    Segments that follow one another from tick 0 to the last.

  Raises:
    ValueError: another `unroll`.
  """
  if unroll not in ("auto", *SHAPES):
    raise ValueError(f"unroll={unroll!r} is unknown; use auto, {', '.join(SHAPES)}")
  if unroll != "auto":
    return _shaped(program, unroll)
  shapes = [_shaped(program, shape) for shape in SHAPES]
  # From the smallest program to the largest; each must beat the one chosen so far.
  chosen, least = shapes[0], estimated_time(program, shapes[0])
  for shape in shapes[1:]:
    if sum(segment.period for segment in shape) <= _MOST_TICKS:
      time = estimated_time(program, shape)
      if time < (1 - _LEAST_GAIN) * least:
        chosen, least = shape, time
  return chosen


def _shaped(program: Program, shape: str) -> tuple[Segment, ...]:
  """Returns the segments of one of `SHAPES`."""
  if shape == "none":
    return (Segment(0, 1, program.ticks),)
  if shape == "all":
    return (Segment(0, program.ticks, 1),)
  # Ticks on which the same happens get the same number, so that periods are periods of numbers.
  numbers: dict[Hashable, int] = {}
  ids = np.array([numbers.setdefault(tick, len(numbers)) for tick in program.doing])
  return tuple(_loops(ids, 0))


def _loops(ids: np.ndarray, start: int) -> Iterator[Segment]:
  """Makes a loop of the stretch of ticks that saves most, then treats what is left on both sides.

  Args:
    ids: int [n], equal for ticks on which the same happens.
    start: the tick of `ids[0]`.
  """
  found = max(_stretches(ids), key=lambda s: s.period * (s.repeats - 1), default=None)
  if found is None or found.period * (found.repeats - 1) < _LEAST_SAVED:
    if len(ids):
      yield Segment(start, len(ids), 1)
    return
  yield from _loops(ids[: found.start], start)
  yield Segment(start + found.start, found.period, found.repeats)
  yield from _loops(ids[found.stop :], start + found.stop)


def _stretches(ids: np.ndarray) -> Iterator[Segment]:
  """Yields for every period the longest stretch that has it, as a segment; short periods first."""
  for period in range(1, min(len(ids) // 2, _LONGEST_PERIOD) + 1):
    # A run of n positions at which `ids[i] == ids[i + period]` is a stretch of n + period ticks.
    # Zeros at both ends, so that every run has an edge where it begins and one where it stops.
    same = np.concatenate([[0], ids[:-period] == ids[period:], [0]])
    edges = np.flatnonzero(np.diff(same))
    starts, stops = edges[::2], edges[1::2]
    if len(starts):
      longest = int(np.argmax(stops - starts))
      repeats = 1 + int(stops[longest] - starts[longest]) // period
      yield Segment(int(starts[longest]), period, repeats)
