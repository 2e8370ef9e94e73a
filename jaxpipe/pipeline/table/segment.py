"""A stretch of ticks that is compiled as one loop, or as one straight line.

    ticks      0  1  2 | 3  4 | 5  6 | 7  8 | 9
    segments   0 .. 2  | 3 .. 8             | 9
               period 3  period 2, repeats 3  period 1
               straight  a loop over ticks     straight
                         (3, 4) (5, 6) (7, 8)

`unroll.py` divides the ticks of a program into segments, whose bodies the executor compiles once
each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxpipe.pipeline.table.program import Doing


@dataclasses.dataclass(frozen=True)
class Segment:
  """Consecutive ticks: `repeats` times a body of `period` ticks.

  Attributes:
    start: the first tick.
    period: ticks in the body.
    repeats: how often the body runs; 1 where it is not looped over.
  """

  start: int
  period: int
  repeats: int

  @property
  def stop(self) -> int:
    """The first tick after the segment."""
    return self.start + self.period * self.repeats

  @property
  def straight(self) -> bool:
    """Whether the body holds several ticks or is not looped over: all but a loop of one tick."""
    return self.period > 1 or self.repeats == 1

  def bodies(self, doing: Sequence[Doing]) -> list[Doing]:
    """Returns what may happen on each tick of the body, in any of its repetitions.

    Args:
      doing: what happens on each tick of the whole program, in order.

    Returns:
      `period` unions; the i-th is over the ticks `start + i`, `start + i + period`, ...
    """
    ticks = doing[self.start : self.stop]
    return [Doing.any_of(ticks[i :: self.period]) for i in range(self.period)]
