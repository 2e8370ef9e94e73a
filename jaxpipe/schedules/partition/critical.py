"""The makespan of an order as a function of its stages' costs, and the paths that decide it.

With each device's list fixed, actions wait only for what ran before, and the makespan is the
longest path through these waits. Every path is a linear function of the stages' durations (how
often it passes F, I and W of each), so the makespan is the largest of many linear functions:
convex, and never less when a duration grows. P=3, M=4, 1F1B, the path that stage 1 decides:

  device 0 | F0 F1 F2          B0--- F3 B1---    B2---    B3--- |   F0 of stage 0,
  device 1 |    F0 F1       B0--- F2 B1--- F3 B2---    B3---     |   all of stage 1,
  device 2 |       F0 B0--- F1 B1--- F2 B2--- F3 B3---           |   B3 of stage 0

These linear functions are what `minimax` bounds partitions with.
"""

from collections.abc import Sequence

from jaxpipe.schedules.kinds import REQUIRED, Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.walk import walk

# For each stage, how often a path passes its F, I and W.
PathWeights = tuple[tuple[int, int, int], ...]
# For each stage, the durations of its F, I and W.
Loads = Sequence[tuple[float, float, float]]

# For every kind whose time is its stage's, the positions in `Loads` that add up to it.
_PARTS = {
  kind: tuple(REQUIRED.index(Kind(letter)) for letter in kind.info.times)
  for kind in Kind
  if kind.info.times is not None
}
# How much heavier a device is made than the others to find the paths that it decides.
_HEAVY = 1000


class CriticalPaths:
  """The waits of a schedule, laid out once and then evaluated for many costs.

  Attributes:
    schedule: the schedule.
    hop: latency between two devices.
  """

  def __init__(self, schedule: Schedule, hop: float = 0) -> None:
    """Walks the schedule once.

    Args:
      schedule: a legal schedule of passes through stages, with gathers of weights or without.
      hop: latency of sending between two devices.

    Raises:
      ValueError: the schedule has other actions, whose cost is not the stages' alone.
    """
    self.schedule, self.hop = schedule, hop
    kinds: dict[tuple[tuple[int, int], ...], int] = {}
    # For each visit of the walk: its device, the number of its duration among `self._kinds`, and
    # the visits on other devices that it waits for.
    self._visits: list[tuple[int, int, tuple[int, ...]]] = []
    made: dict[int, tuple[int, int]] = {}
    for visit in walk(schedule):
      for part in visit.step.parts:
        if part.kind not in _PARTS:
          raise ValueError(
            f"{part} is no pass through a stage: partition the schedule without it, and add it then"
          )
      parts = tuple((a.stage, x) for a in visit.step.parts for x in _PARTS[a.kind])
      # What the same device made, its list has before this anyway.
      waits = tuple(made[n][0] for n in visit.needs if made[n][1] != visit.device)
      for slot in visit.makes:
        made[slot] = (len(self._visits), visit.device)
      self._visits.append((visit.device, kinds.setdefault(parts, len(kinds)), waits))
    self._kinds = list(kinds)

  def makespan(self, loads: Loads) -> float:
    """Returns the makespan that `simulate` finds, for S durations of F, I and W."""
    return max(self._ends(loads))

  def path(self, loads: Loads) -> tuple[PathWeights, float]:
    """Returns a longest path: how often it passes F, I and W of each stage, and its hops' time."""
    ends, durations = self._ends(loads), self._durations(loads)
    before: list[int] = []
    last = [-1] * self.schedule.devices
    for i, (d, _, _) in enumerate(self._visits):
      before.append(last[d])
      last[d] = i
    counts = [[0, 0, 0] for _ in range(self.schedule.stages)]
    at, hops = max(range(len(ends)), key=ends.__getitem__), 0
    while at >= 0:
      _, kind, waits = self._visits[at]
      for stage, x in self._kinds[kind]:
        counts[stage][x] += 1
      start = ends[at] - durations[kind]
      # Whoever ended last is who was waited for; with floats, `start` is off by a rounding.
      found, latest = before[at], ends[before[at]] if before[at] >= 0 else 0
      for wait in waits:
        if ends[wait] + self.hop > latest:
          found, latest = wait, ends[wait] + self.hop
      assert latest <= start or abs(latest - start) <= 1e-9 * max(1.0, abs(start))
      hops += found >= 0 and self._visits[found][0] != self._visits[at][0]
      at = found
    return tuple((f, i, w) for f, i, w in counts), hops * self.hop

  def device_paths(self) -> list[tuple[PathWeights, float]]:
    """Returns, for every device, a longest path where that device is far slower than all others."""
    found = []
    for row in self.schedule.placement.table:
      loads = [(1, 1, 1)] * self.schedule.stages
      for stage in row:
        loads[stage] = (_HEAVY, _HEAVY, _HEAVY)
      found.append(self.path(loads))
    return found

  def _durations(self, loads: Loads) -> list[float]:
    """Returns the durations of steps, each different combination of passes once."""
    return [sum(loads[stage][x] for stage, x in parts) for parts in self._kinds]

  def _ends(self, loads: Loads) -> list[float]:
    """Returns the end of every visit."""
    durations, hop = self._durations(loads), self.hop
    free: list[float] = [0] * self.schedule.devices
    ends: list[float] = []
    for d, kind, waits in self._visits:
      time = free[d]
      for wait in waits:
        arrival = ends[wait] + hop
        if arrival > time:
          time = arrival
      time += durations[kind]
      ends.append(time)
      free[d] = time
    return ends
