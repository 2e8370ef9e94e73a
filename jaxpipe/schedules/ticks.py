"""Ticks: the rhythm in which one program on all devices runs a schedule.

On every tick each device does at most one step of its list, then whatever was sent arrives. What
crosses between devices may be used `1 + slack` ticks later: a slack of one leaves a whole tick for
the transfer, which then overlaps with work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxpipe.schedules.walk import walk

if TYPE_CHECKING:
  from jaxpipe.schedules.schedule import Schedule

Ticks = tuple[tuple[int, ...], ...]
# (tick, sender, receiver), each once.
Transfers = set[tuple[int, int, int]]


def ticks(schedule: Schedule, slack: int = 0) -> Ticks:
  """The tick of every step: as early as its device and its inputs allow.

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
  """As `ticks`, and what crosses between devices at the end of which tick."""
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
