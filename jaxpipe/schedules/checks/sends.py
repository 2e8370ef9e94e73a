"""Checks that a schedule cannot dead-lock where messages between two devices keep their order.

One program on all devices, with a permute every tick, delivers everything in time and cannot
dead-lock on a legal schedule. Runtimes with one process per device are less forgiving. There every
device sends what it has made right after making it, and receives what it needs right before using
it; messages from one device to another keep their order, and then

  ordered      a sender does not wait: two devices stand still for ever where one sends x before y
               and the other needs y before x
  rendezvous   a sender waits for the receiver: two devices stand still for ever also where both
               send to each other first; such runtimes exchange both ways in one call instead
"""

import dataclasses

from jaxpipe.schedules.actions import Action, ScheduleError
from jaxpipe.schedules.protocol import OrderedActions
from jaxpipe.schedules.walk import Visit, walk

SENDS = ("ordered", "rendezvous")


@dataclasses.dataclass(frozen=True)
class _Message:
  """A product on its way from one device to another.

  Attributes:
    sender: the device that has made it.
    receiver: the device that needs it.
    maker: the step that has made it, as errors name it.
    user: the step that needs it, as errors name it.
  """

  sender: int
  receiver: int
  maker: str
  user: str


# For each device, for each step of its list: the messages it receives before and sends after it.
_Traffic = list[list[tuple[list[_Message], list[_Message]]]]


def check_sends(schedule: OrderedActions, sends: str = "ordered") -> None:
  """Raises if messages that keep their order could dead-lock.

  Args:
    schedule: a legal schedule.
    sends: `ordered` if a sender does not wait for its receiver, `rendezvous` if it does.

  Raises:
    ScheduleError: names the two messages and their devices.
    ValueError: `sends` is unknown.
  """
  if sends not in SENDS:
    raise ValueError(f"unknown sends {sends!r}; known: {', '.join(SENDS)}")
  traffic = _traffic(schedule)
  _check_order(traffic)
  if sends == "rendezvous":
    _meet(traffic)


def _traffic(schedule: OrderedActions) -> _Traffic:
  """Returns the messages of every step, those of one step in the order of the walk."""
  visits = list(walk(schedule))
  made = {slot: visit for visit in visits for slot in visit.makes}
  sent: dict[int, list[_Message]] = {}  # by the identity of the visit that makes it
  received: dict[int, list[_Message]] = {}
  for visit in visits:
    for slot in visit.needs:
      maker = made[slot]
      if maker.device != visit.device:
        message = _Message(maker.device, visit.device, _name(maker), _name(visit))
        sent.setdefault(id(maker), []).append(message)
        received.setdefault(id(visit), []).append(message)
  rows: _Traffic = [[] for _ in schedule.order]
  for visit in visits:
    rows[visit.device].append((received.get(id(visit), []), sent.get(id(visit), [])))
  return rows


def _name(visit: Visit) -> str:
  """Returns what an error calls a step."""
  return str(visit.step) if isinstance(visit.step, Action) else f"the pair {visit.step}"


def _check_order(traffic: _Traffic) -> None:
  """Raises unless messages between any two devices are needed in the order in which they leave."""
  sent: dict[tuple[int, int], list[_Message]] = {}
  needed: dict[tuple[int, int], list[_Message]] = {}
  for row in traffic:
    for receives, sends in row:
      for message in sends:
        sent.setdefault((message.sender, message.receiver), []).append(message)
      for message in receives:
        needed.setdefault((message.sender, message.receiver), []).append(message)
  # The two orders have the same messages; where they first differ, both devices would wait.
  for (a, b), messages in sent.items():
    for first, wanted in zip(messages, needed[a, b], strict=True):
      if first != wanted:
        raise ScheduleError(
          f"{wanted.user} on device {b} waits for {wanted.maker}, but device {a} sends"
          f" {first.maker} before it; with ordered sends both stand still"
        )


def _meet(traffic: _Traffic) -> None:
  """Runs all devices, with sends that wait for their receivers, and raises if some get stuck."""
  # Flattened: a device is at one message at a time; computing in between never blocks.
  todo = [
    [message for receives, sends in row for message in (*receives, *sends)] for row in traffic
  ]
  at = [0] * len(todo)
  awake = list(range(len(todo)))
  while awake:
    d = awake.pop()
    while at[d] < len(todo[d]):
      message = todo[d][at[d]]
      other = message.receiver if message.sender == d else message.sender
      # Whichever end comes to the message second completes it for both.
      if at[other] == len(todo[other]) or todo[other][at[other]] != message:
        break
      at[d] += 1
      at[other] += 1
      awake.append(other)
  stuck = [d for d, row in enumerate(todo) if at[d] < len(row)]
  if stuck:
    raise _standstill(todo, at, stuck[0])


def _standstill(todo: list[list[_Message]], at: list[int], d: int) -> ScheduleError:
  """Returns the error that names a circle of devices waiting for each other, starting at d."""
  seen: list[int] = []
  while d not in seen:
    seen.append(d)
    message = todo[d][at[d]]
    d = message.receiver if message.sender == d else message.sender
  waits = [
    f"device {d} {'sends' if todo[d][at[d]].sender == d else 'receives'} {todo[d][at[d]].maker}"
    for d in seen[seen.index(d) :]
  ]
  return ScheduleError(
    f"{' while '.join(waits)}: where a send waits for its receive none goes on; exchange both ways"
    " in one call"
  )
