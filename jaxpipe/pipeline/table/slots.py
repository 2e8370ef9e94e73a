"""Slots from lifetimes: what a device holds at once decides how long its buffers are.

A value stays in a buffer from the tick that fills a slot to the tick that last reads it. Handing
slots out in the order in which values arrive is optimal for intervals: a buffer is exactly as long
as the most values that it ever holds on one device, so that memory is the schedule's memory.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Hashable, Iterable


@dataclasses.dataclass(frozen=True, slots=True)
class Stay:
  """One value's stay: a slot is filled at the end of tick `start` and last read in tick `end`.

  Attributes:
    buffer: in which of the buffers, by name.
    device: on which device.
    start, end: ticks.
    what: names the value, uniquely on its device and buffer.
  """

  buffer: str
  device: int
  start: int
  end: int
  what: tuple[int, ...]


def colour(
  stays: Iterable[Stay], buffers: Iterable[str]
) -> tuple[dict[Hashable, int], dict[str, int]]:
  """Gives every stay a slot; two on one device and buffer share a slot one after the other.

  Args:
    stays: in any order.
    buffers: names of all buffers, those without a stay included.

  Returns:
    `(buffer, device, what) -> slot`, and every buffer's slots: the largest need of any device, for
    all devices run one program.
  """
  slot: dict[Hashable, int] = {}
  slots = dict.fromkeys(buffers, 0)
  free: dict[tuple[str, int], list[int]] = {}
  busy: dict[tuple[str, int], list[tuple[int, int]]] = {}
  for stay in sorted(stays, key=lambda stay: (stay.start, stay.end, stay.what)):
    where = (stay.buffer, stay.device)
    idle, running = free.setdefault(where, []), busy.setdefault(where, [])
    # A tick reads before it writes, so a slot last read in tick t may be filled at the end of t.
    while running and running[0][0] <= stay.start:
      heapq.heappush(idle, heapq.heappop(running)[1])
    number = heapq.heappop(idle) if idle else len(running)
    heapq.heappush(running, (stay.end, number))
    slot[stay.buffer, stay.device, stay.what] = number
    slots[stay.buffer] = max(slots[stay.buffer], number + 1)
  return slot, slots
