"""Gives values slots of a buffer by their live ranges, so that a buffer is as short as can be.

A value's live range goes from the tick that fills its slot to the tick that last reads it. Ranges
that do not overlap may share a slot. Drawn as a graph, with an edge between ranges that overlap,
this is colouring the graph of intervals, which is easy where graphs in general are not: hand out
slots in the order in which ranges begin, always the lowest that is free. That uses exactly as many
slots as the most values that are ever alive at once, so that the executor's memory is the
schedule's own.

    tick     0  1  2  3  4  5  6  7
    slot 0   |--a--|  |---d----|          4 ranges, at most 2 alive at once: 2 slots
    slot 1      |---b----||---c---|
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class LiveRange:
  """The ticks for which one value needs a slot of a buffer on one device.

  Attributes:
    buffer: name of the buffer.
    device: device d that holds the value.
    start: the tick at whose end the slot is filled. A slot that is filled at the beginning of tick
      t counts as filled at the end of tick t - 1, which is -1 for the first tick.
    end: the tick that last reads the slot, at least `start`.
    value: names the value, uniquely on its device and in its buffer, such as (stage, microbatch).
  """

  buffer: str
  device: int
  start: int
  end: int
  value: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slots:
  """The slots of all values, as `colour` gives them.

  Attributes:
    number: (buffer, device, value) -> its slot.
    count: buffer -> how many slots it needs: the largest need of any device, for all devices run
      one program.
  """

  number: Mapping[tuple[str, int, tuple[int, ...]], int]
  count: Mapping[str, int]

  def of(self, buffer: str, device: int, value: tuple[int, ...]) -> int:
    """Returns a value's slot, or *nowhere* (`count[buffer]`) for a value not in the buffer."""
    return self.number.get((buffer, device, value), self.count[buffer])


def colour(ranges: Iterable[LiveRange], buffers: Iterable[str]) -> Slots:
  """Gives every live range a slot that no other one on its device and buffer has at the time.

  Args:
    ranges: in any order.
    buffers: names of all buffers, those without a range included.
  """
  slot: dict[tuple[str, int, tuple[int, ...]], int] = {}
  slots = dict.fromkeys(buffers, 0)
  # By buffer and device: a heap of the slots that are free again, and one of (end, slot) in use.
  free: dict[tuple[str, int], list[int]] = {}
  busy: dict[tuple[str, int], list[tuple[int, int]]] = {}
  for one in sorted(ranges, key=lambda one: (one.start, one.end, one.value)):
    where = (one.buffer, one.device)
    idle, running = free.setdefault(where, []), busy.setdefault(where, [])
    # A tick reads before it writes, so a slot last read in tick t may be filled at the end of t.
    while running and running[0][0] <= one.start:
      heapq.heappush(idle, heapq.heappop(running)[1])
    # With none free, slots 0 to n - 1 are all in use, and the next one is n.
    number = heapq.heappop(idle) if idle else len(running)
    heapq.heappush(running, (one.end, number))
    slot[one.buffer, one.device, one.value] = number
    slots[one.buffer] = max(slots[one.buffer], number + 1)
  return Slots(slot, slots)
