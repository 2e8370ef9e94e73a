"""Assigns every step of a schedule to a tick of one program that runs on all devices.

A schedule may say its ticks itself, as those by kind do (`by_kind/`). Otherwise each step is as
early as it can be. On every tick each device does at most one step of its list, then what was sent
arrives. A product that crosses between devices may be used `1 + slack` ticks after it was made: a
slack of one leaves a whole tick for the transfer, which then overlaps with work.

  1F1B, P=2, M=2       tick 0  1  2  3  4  5
  slack 0   device 0        F0 F1    B0    B1
            device 1           F0 B0 F1 B1

Where a schedule's own ticks leave less time for transfers than the slack, later ticks move back,
each as a whole: what stood on one tick stays on one.
"""

import operator
from collections.abc import Iterable, Sequence

from jaxpipe.schedules.actions import ScheduleError
from jaxpipe.schedules.protocol import OrderedActions, Ticks
from jaxpipe.schedules.walk import Visit, walk

# (tick at whose end it is sent, sender, receiver), each once.
Transfers = set[tuple[int, int, int]]


def ticks(schedule: OrderedActions, slack: int = 0) -> Ticks:
  """Returns the tick of every step: the schedule's own, or as early as device and inputs allow.

  Args:
    schedule: a legal schedule.
    slack: ticks that a transfer between devices may take beyond the one that sends it.

  Returns:
    `ticks[d][i]` is that of the i-th step of device d's list.

  Raises:
    ScheduleError: the schedule dead-locks.
  """
  return ticks_and_transfers(schedule, slack)[0]


def ticks_and_transfers(schedule: OrderedActions, slack: int = 0) -> tuple[Ticks, Transfers]:
  """Returns the tick of every step, and the transfers between devices.

  Args:
    schedule: a legal schedule.
    slack: ticks that a transfer between devices may take beyond the one that sends it.

  Returns:
    The ticks, and (tick, sender, receiver) for each pair of devices and tick with a transfer.

  Raises:
    ScheduleError: the schedule dead-locks.
  """
  visits = walk(schedule)
  return (
    _early(schedule, visits, slack)
    if schedule.ticks is None
    else _own(schedule.ticks, list(visits), slack)
  )


def early_ticks(schedule: OrderedActions) -> Ticks:
  """Returns the earliest tick of every step, whatever ticks the schedule has."""
  return _early(schedule, walk(schedule), 0)[0]


def without_gaps(ticks: Sequence[Sequence[int]]) -> Ticks:
  """Returns ticks renumbered, those left out on which no device works."""
  number = {tick: n for n, tick in enumerate(sorted({tick for row in ticks for tick in row}))}
  return tuple(tuple(number[tick] for tick in row) for row in ticks)


def whole_numbers(ticks: Sequence[Sequence[int]]) -> Ticks:
  """Returns ticks as somebody gives them as tuples of Python's own whole numbers.

  Raises:
    ScheduleError: they are something else.
  """
  try:
    rows = tuple(tuple(row) for row in ticks)
    if any(isinstance(tick, bool) for row in rows for tick in row):
      raise TypeError
    return tuple(tuple(operator.index(tick) for tick in row) for row in rows)
  except TypeError:
    raise ScheduleError(
      f"ticks are a list of whole numbers for each device, not {ticks!r:.80}"
    ) from None


def _early(
  schedule: OrderedActions, visits: Iterable[Visit], slack: int
) -> tuple[Ticks, Transfers]:
  """Returns ticks that are as early as can be."""
  rows: list[list[int]] = [[] for _ in schedule.order]
  made: dict[int, tuple[int, int]] = {}  # slot -> tick and device
  transfers: Transfers = set()
  for visit in visits:
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


def _own(own: Ticks, visits: Sequence[Visit], slack: int) -> tuple[Ticks, Transfers]:
  """Returns the schedule's own ticks, moved back where a transfer would come too late."""
  maker: dict[int, tuple[int, int]] = {}  # slot -> tick and device, in the schedule's own ticks
  steps: dict[int, list[Visit]] = {}  # tick -> what runs on it
  position = [0] * len(own)
  for visit in visits:
    tick = own[visit.device][position[visit.device]]
    position[visit.device] += 1
    steps.setdefault(tick, []).append(visit)
    maker.update((slot, (tick, visit.device)) for slot in visit.makes)
  moved: dict[int, int] = {}
  transfers: Transfers = set()
  late = 0
  for tick in sorted(steps):
    crossing = set()
    for visit in steps[tick]:
      for slot in visit.needs:
        sent, sender = maker[slot]
        if sender != visit.device:
          crossing.add((moved[sent], sender, visit.device))
    # Ticks on which nobody works keep their place, for a transfer may need them.
    moved[tick] = max([tick + late, *(sent + 1 + slack for sent, *_ in crossing)])
    late = moved[tick] - tick
    transfers |= crossing
  return tuple(tuple(moved[tick] for tick in row) for row in own), transfers
