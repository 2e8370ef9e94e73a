"""Shifts forwards against all other actions: each device runs its forwards some places earlier.

The forwards that come before a backward say how many microbatches a device holds. Running every
forward in the place of an earlier one holds more of them, and gives the inputs of backwards more
time to arrive. By one, for 1F1B on the second of three devices:

  F0 B0 | F1 B1 | F2 B2 | ...      becomes      F0 F1 B0 | F2 B1 | F3 B2 | ...

The result is not a list but what a list must keep to: no forward may overtake the others that the
shifted list has before it. Each of these waits is also one of the original order's, so that a
schedule which keeps them and has each device's forwards and others in order cannot dead-lock.
"""

import dataclasses

from jaxpipe.schedules.actions import Action, Overlap, Step
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.walk import walk


@dataclasses.dataclass(slots=True)
class Item:
  """One action of a device's list.

  Attributes:
    action: the action.
    needs: slots of the products it waits for, as the walk numbers them.
    makes: slots of its products that others wait for.
    gate: for a forward, the number of other actions of its device that must run before it; for the
      backward of an overlapped pair, the number of forwards that run before the one that it pairs
      with; else 0.
  """

  action: Action
  needs: tuple[int, ...]
  makes: tuple[int, ...]
  gate: int = 0


@dataclasses.dataclass(slots=True)
class Lists:
  """A device's list, taken apart into forwards and other actions.

  Attributes:
    forwards: the forwards, in order.
    others: all other actions, in order.
    forwards_run: number of forwards that have run so far.
    others_run: number of other actions that have run so far.
  """

  forwards: list[Item] = dataclasses.field(default_factory=list)
  others: list[Item] = dataclasses.field(default_factory=list)
  forwards_run: int = 0
  others_run: int = 0

  def heads(self) -> tuple[Item | None, Item | None]:
    """Returns the next forward, None where its gate is closed, and the next other action."""
    n, j = self.forwards_run, self.others_run
    forward = self.forwards[n] if n < len(self.forwards) else None
    if forward is not None and forward.gate > j:
      forward = None
    return forward, self.others[j] if j < len(self.others) else None


def shifted(schedule: Schedule, by: int) -> list[Lists]:
  """Divides each device's list into forwards and the others, and shifts them by gates.

  Args:
    schedule: a legal schedule.
    by: how many forwards earlier each forward takes its place, 1 or more.

  Returns:
    One pair of lists per device. Overlapped pairs are taken apart; their backwards have a gate.
  """
  found = [Lists() for _ in schedule.order]
  flat = tuple(tuple(part for step in row for part in step.parts) for row in schedule.order)
  # A legal schedule stays legal with the parts of its pairs one after the other.
  for visit in walk(dataclasses.replace(schedule, order=flat)):
    (action,) = visit.step.parts
    lists = found[visit.device]
    item = Item(action, tuple(visit.needs), tuple(visit.makes))
    (lists.forwards if action.kind is Kind.F else lists.others).append(item)
  for lists, row in zip(found, schedule.order, strict=True):
    _shift(lists, row, by)
  return found


def _shift(lists: Lists, row: tuple[Step, ...], by: int) -> None:
  """Sets the gates of one device: each forward takes the place of the one `by` before it."""
  n = j = 0
  for step in row:
    if step.parts[0].kind is Kind.F:
      if n + by < len(lists.forwards):
        lists.forwards[n + by].gate = j
      n += 1
    if step.parts[-1].kind is not Kind.F:
      if isinstance(step, Overlap) and n - 1 + by < len(lists.forwards):
        lists.others[j].gate = n - 1 + by
      j += 1
