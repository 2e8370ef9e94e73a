"""Assigns every step of a schedule to a tick of one program that runs on all devices.

On every tick each device does at most one step of its list, then what was sent arrives. A product
that crosses between devices may be used `1 + slack` ticks after it was made: a slack of one leaves
a whole tick for the transfer, which then overlaps with work.

  1F1B, P=2, M=2       tick 0  1  2  3  4  5
  slack 0   device 0        F0 F1    B0    B1
            device 1           F0 B0 F1 B1
"""

from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.walk import walk

# `[d][i]` is the tick of the i-th step of device d's list.
Ticks = tuple[tuple[int, ...], ...]
# (tick at whose end it is sent, sender, receiver), each once.
Transfers = set[tuple[int, int, int]]


def ticks(schedule: Schedule, slack: int = 0) -> Ticks:
  """Returns the tick of every step: as early as its device and its inputs allow.

  Args:
    schedule: a legal schedule.
    slack: ticks that a transfer between devices may take beyond the one that sends it.

  Returns:
    `ticks[d][i]` is that of the i-th step of device d's list.

  Raises:
    ScheduleError: the schedule dead-locks.
  """
  return ticks_and_transfers(schedule, slack)[0]


def ticks_and_transfers(schedule: Schedule, slack: int = 0) -> tuple[Ticks, Transfers]:
  """Returns the tick of every step, and the transfers between devices.

  Args:
    schedule: a legal schedule.
    slack: ticks that a transfer between devices may take beyond the one that sends it.

  Returns:
    The ticks, and (tick, sender, receiver) for each pair of devices and tick with a transfer.

  Raises:
    ScheduleError: the schedule dead-locks.
  """
  rows: list[list[int]] = [[] for _ in schedule.order]
  made: dict[int, tuple[int, int]] = {}  # slot -> tick and device
  transfers: Transfers = set()
  for visit in walk(schedule):
    d = visit.device
    tick = rows[d][-1] + 1 if rows[d] else 0
    for slot in visit.needs:
      sent, sender = made[slot]
      if sender == d:
        tick = max(tick, sent + 1)
      else:
        tick = max(tick, sent + 1 + slack)
        transfers.add((sent, sender, d))
    rows[d].append(tick)
    for slot in visit.makes:
      made[slot] = (tick, d)
  return tuple(map(tuple, rows)), transfers
