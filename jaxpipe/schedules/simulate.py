"""Simulates a schedule: start and end of every action, idle time, and what each device holds.

Devices run their lists in order; an action starts when its device is free and its inputs have
arrived. Three models of execution say what else it waits for:

  free      nothing: every device runs on its own (one process per device)
  barrier   every tick begins when all devices have ended the one before
  coupled   every tick of a device begins when those it exchanges with have ended the one before,
            or, with slack, the one `slack` earlier (one program with a permute each tick)

Two bubbles are reported because two are paid. Over the *makespan*: the idle share of all devices
between the first start and the last end, which a jitted step with its barrier pays. Over the
*span*: the same for the longest single device alone, which the Zero Bubble papers print
(Qi et al., 2023, arXiv:2401.10241), where the next step may start before this one has ended.
"""

import dataclasses
from collections.abc import Callable

from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.ticks import ticks_and_transfers
from jaxpipe.schedules.walk import Visit, walk

_Times = list[list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
  """A schedule in time, in the unit of its costs.

  Attributes:
    schedule: the schedule that was simulated.
    start: `start[d][i]` is the time at which device d starts the i-th step of its list.
    end: `end[d][i]` is the time at which that step ends.
    busy: P times, the sum of the durations of each device's steps.
    peak_activations: P numbers, the most chunks that a device holds at once, from F until W or B.
    peak_pending_weight_grads: P numbers, the most chunks at once whose I is done and whose W is
      not.
    peak_memory: P amounts, the most memory that a device holds at once, in the unit of `memory`.
  """

  schedule: Schedule
  start: tuple[tuple[float, ...], ...]
  end: tuple[tuple[float, ...], ...]
  busy: tuple[float, ...]
  peak_activations: tuple[int, ...]
  peak_pending_weight_grads: tuple[int, ...]
  peak_memory: tuple[float, ...]

  @property
  def makespan(self) -> float:
    """Time from the start of the step to its last end."""
    return max(row[-1] for row in self.end if row)

  @property
  def span(self) -> float:
    """Longest time of a single device from its first start to its last end."""
    return max(map(_working_time, self.start, self.end))

  @property
  def bubble(self) -> float:
    """Idle share of all devices over the makespan: 1 - sum(busy) / (P * makespan)."""
    # One division, at the end: with integers, everything before it is exact.
    total = len(self.busy) * self.makespan
    return (total - sum(self.busy)) / total if total else 0.0

  @property
  def span_bubble(self) -> float:
    """Idle share over the span: (span - max(busy)) / span."""
    return (self.span - max(self.busy)) / self.span if self.span else 0.0


def _working_time(starts: tuple[float, ...], ends: tuple[float, ...]) -> float:
  """Returns the time from the first start to the last end of steps that take any time."""
  # A gather of weights that takes no time would otherwise count as the beginning.
  work = [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]
  return work[-1][1] - work[0][0] if work else 0


def simulate(
  schedule: Schedule,
  costs: Costs | None = None,
  memory: Memory = (1, 0, -1),
  *,
  execution: str = "free",
  slack: int = 0,
) -> Timeline:
  """Runs a schedule on paper.

  Args:
    schedule: a legal schedule, or the forward-only part of one.
    costs: durations; by default every F, I and W takes 1 and a hop nothing.
    memory: changes of the memory that a device holds by an F, an I and a W (and an R), each a
      number or a sequence by stage. A fused B changes it by I + W at once.
    execution: `free`, `barrier` or `coupled`.
    slack: for `coupled`, the ticks that a transfer may take beyond the one that sends it.

  Returns:
    The timeline, in the units of `costs` and `memory`.

  Raises:
    ScheduleError: the schedule dead-locks.
    ValueError: a list of costs or memory has not one entry per stage, or the model is unknown.
  """
  if execution not in _MODELS:
    raise ValueError(f"unknown execution {execution!r}; known: {', '.join(_MODELS)}")
  if slack < 0 or (slack and execution != "coupled"):
    raise ValueError(f"slack={slack} needs 0 or more ticks, and execution='coupled'")
  if slack > sum(map(len, schedule.order)):
    raise ValueError(f"slack={slack} is longer than the schedule; use a few ticks")
  costs = costs or Costs()
  if costs.hop_occupies_link and execution != "free":
    raise ValueError(f"execution={execution!r} has no links; use execution='free'")
  times = costs.all_durations(schedule)
  durations = [[costs.of(step, times) for step in row] for row in schedule.order]
  starts, ends = _MODELS[execution](schedule, costs, durations, slack)
  held = peaks(schedule, memory)
  return Timeline(
    schedule=schedule,
    start=tuple(map(tuple, starts)),
    end=tuple(map(tuple, ends)),
    busy=tuple(map(sum, durations)),
    peak_activations=held.activations,
    peak_pending_weight_grads=held.pending_weight_grads,
    peak_memory=held.memory,
  )


def _free(schedule: Schedule, costs: Costs, durations: _Times, slack: int) -> tuple[_Times, _Times]:
  """Returns starts and ends where devices wait for nothing but their inputs."""
  if costs.hop_occupies_link and costs.hop:
    return _free_with_links(schedule, costs.hop, durations)
  hop = costs.hop
  starts: _Times = [[] for _ in durations]
  ends: _Times = [[] for _ in durations]
  free: list[float] = [0] * len(durations)
  # When and where every awaited product appeared, by its slot. Where is noted rather than asked of
  # the placement: a stage with replicas has no single place.
  made: dict[int, tuple[float, int]] = {}
  for visit in walk(schedule):
    d = visit.device
    start = free[d]
    for slot in visit.needs:
      when, where = made[slot]
      # Chunks on one device hand over in place.
      arrival = when if where == d else when + hop
      if arrival > start:
        start = arrival
    end = start + durations[d][len(starts[d])]
    starts[d].append(start)
    ends[d].append(end)
    free[d] = end
    for slot in visit.makes:
      made[slot] = (end, d)
  return starts, ends


def _free_with_links(schedule: Schedule, hop: float, durations: _Times) -> tuple[_Times, _Times]:
  """Returns starts and ends where every link between two devices carries one transfer at a time.

  Transfers leave in the order in which their sender makes them, each for the time of a hop.
  """
  visits = list(walk(schedule))
  # A product is sent once to each device that needs it, so these must be known when it is made.
  receivers = _receivers(visits)
  starts: _Times = [[] for _ in durations]
  ends: _Times = [[] for _ in durations]
  arrived: dict[tuple[int, int], float] = {}  # slot and device -> when
  links: dict[tuple[int, int], float] = {}  # sender and receiver -> when it is free again
  for visit in visits:
    d = visit.device
    start = max([ends[d][-1] if ends[d] else 0, *(arrived[slot, d] for slot in visit.needs)])
    end = start + durations[d][len(starts[d])]
    starts[d].append(start)
    ends[d].append(end)
    for slot in visit.makes:
      arrived[slot, d] = end
      for receiver in receivers.get(slot, ()):
        if receiver != d:
          links[d, receiver] = max(end, links.get((d, receiver), 0)) + hop
          arrived[slot, receiver] = links[d, receiver]
  return starts, ends


def _receivers(visits: list[Visit]) -> dict[int, list[int]]:
  """Returns the devices that need each slot, each once."""
  found: dict[int, list[int]] = {}
  for visit in visits:
    for slot in visit.needs:
      devices = found.setdefault(slot, [])
      if visit.device not in devices:
        devices.append(visit.device)
  return found


def _barrier(
  schedule: Schedule, costs: Costs, durations: _Times, slack: int
) -> tuple[_Times, _Times]:
  """Returns starts and ends where every tick is as long as its longest action."""
  at, transfers = ticks_and_transfers(schedule)
  lengths: list[float] = [0] * (1 + max(row[-1] for row in at if row))
  for row, times in zip(at, durations, strict=True):
    for tick, time in zip(row, times, strict=True):
      lengths[tick] = max(lengths[tick], time)
  if transfers:
    # Every tick but the last exchanges, whether or not something is on its way.
    lengths[:-1] = [length + costs.hop for length in lengths[:-1]]
  begins: list[float] = [0]
  for length in lengths:
    begins.append(begins[-1] + length)
  starts = [[begins[tick] for tick in row] for row in at]
  return starts, _ends(starts, durations)


def _coupled(
  schedule: Schedule, costs: Costs, durations: _Times, slack: int
) -> tuple[_Times, _Times]:
  """Returns starts and ends where a tick waits for the ticks of the devices it exchanges with."""
  at, transfers = ticks_and_transfers(schedule, slack)
  P = len(at)
  peers: list[set[int]] = [set() for _ in range(P)]
  for _, sender, receiver in transfers:
    # Every tick exchanges both ways, whether or not something is on its way.
    peers[sender].add(receiver)
    peers[receiver].add(sender)
  todo = [dict(zip(row, times, strict=True)) for row, times in zip(at, durations, strict=True)]
  starts: _Times = [[] for _ in range(P)]
  # `ended[k]` are the devices' ends of the tick k + 1 before the present one.
  ended: list[list[float]] = [[0] * P for _ in range(1 + slack)]
  for tick in range(1 + max(row[-1] for row in at if row)):
    # Nothing can arrive of ticks before the first.
    hop = costs.hop if tick > slack else 0
    begin = [max([ended[0][d], *(ended[slack][peer] + hop for peer in peers[d])]) for d in range(P)]
    for d in range(P):
      if tick in todo[d]:
        starts[d].append(begin[d])
    ended = [[begin[d] + todo[d].get(tick, 0) for d in range(P)], *ended[:slack]]
  return starts, _ends(starts, durations)


def _ends(starts: _Times, durations: _Times) -> _Times:
  """Returns the ends of steps from their starts and durations."""
  return [
    [start + time for start, time in zip(row, times, strict=True)]
    for row, times in zip(starts, durations, strict=True)
  ]


# (schedule, costs, durations of all steps, slack) -> starts and ends of all steps.
_Model = Callable[[Schedule, Costs, _Times, int], tuple[_Times, _Times]]
_MODELS: dict[str, _Model] = {
  "free": _free,
  "barrier": _barrier,
  "coupled": _coupled,
}

# Their names; the first is the default.
EXECUTIONS = tuple(_MODELS)
