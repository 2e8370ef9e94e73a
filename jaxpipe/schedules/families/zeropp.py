"""ZeroPP: chunk by chunk in units of microbatches (Tang et al., 2024, arXiv:2402.03791).

P=2, V=2, M=4, U=2, an I and a W as long as an F, gathers and releases taking no time:

  device 0 | 0F0 0F1 2F0 2F1         2I0 2I1 0I0 0I1 2W0 0F2 0F3 2W1 2F2 2F3 0W0
  device 1 |     1F0 1F1 3F0 3F1 3I0 3I1 1I0 1I1 3W0 3W1 1W0 1W1 1F2 1F3 3F2 3F3

  device 0 |  0W1 2I2 2I3 0I2 0I3 2W2 2W3 0W2 0W3 | peak 6
  device 1 |  3I2 3I3 1I2 1I3 3W2 3W3 1W2 1W3     | peak 4

  unit of U microbatches:  F chunk 0 | F chunk 1 | .. | [1] | I last chunk | [2] .. | I chunk 0
  W, which needs no weights:  [1] of the unit before, [2] of this one, [3] all but a few at its end

With fully sharded weights, every chunk is gathered once for its block of forwards and once for its
block of input gradients (G), and released after each (X), so a device gathers 2 V ceil(M/U) times
per step, where a schedule that changes chunks with every pass would 2 V M times. The last chunk's
two blocks follow each other; it is gathered for each all the same. Between blocks a device waits
for the trip to the last device and back, (P-1-d) (F + I): each unit keeps back the Ws that hide it
and a few more, VU-1 at most, and where they suffice only the first unit pays for the trip:

  makespan     M V (F + I + W) + (P-1) (F + I)
  looped-bfs   M V (F + I + W) + (P-1) (F + I + W)

A device holds VU chunks and what it keeps back, fewer than 2 VU, where breadth-first holds VM.

Blocks, units and staggered Ws are the paper's. How many Ws are kept back is ours, and so is the
default U: the least of at least P microbatches, about (P-1) (F + I + W) / (V W), for which the
makespan is not above looped-bfs's; M where there is none.
"""

import collections
import math

from jaxpipe.schedules.actions import Action, Order
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec

# Weight gradients kept beyond those that hide the trip, for devices whose gaps they do not fit
# exactly: an overrun makes the gaps after it longer.
_SPARE = 4


def zeropp(spec: Spec) -> Schedule:
  """Builds ZeroPP: units of blocks of F and of I, weight gradients where devices wait.

  Args:
    spec: devices, microbatches and chunks, any numbers of them; `costs` to plan with; the option
      `unit` is U, more than M is M. A last unit may be smaller.

  Returns:
    The schedule, its backward split, with gathers and releases.
  """
  M = spec.microbatches
  U = spec.options.get("unit")
  if U is not None:
    return _plan(spec, min(U, M)).schedule()
  count, bound = _most_units(spec), _breadth_first_time(spec)
  while True:
    U = math.ceil(M / count)
    plan = _plan(spec, U)
    # One unit is breadth-first with its Ws out of the way. Gathers count as work here, so that
    # where they take time of the device's own, fewer units are planned.
    if count == 1 or plan.makespan() <= bound:
      return plan.schedule()
    count = _fewer_units(count // 2, M, U)


def _plan(spec: Spec, unit: int) -> "_Plan":
  """Plans all microbatches in units of so many, of which the last may be smaller."""
  plan = _Plan(spec, spec.chunks * unit - 1)
  for begin in range(0, spec.microbatches, unit):
    plan.unit(range(begin, min(begin + unit, spec.microbatches)))
  plan.finish()
  return plan


def _most_units(spec: Spec) -> int:
  """Returns the most units of which each has weight gradients enough to hide a round trip."""
  P, M, V = spec.devices, spec.microbatches, spec.chunks
  times, hop = spec.costs.durations(P * V), spec.costs.hop
  forward, input_grad = max(times[Kind.F]), max(times[Kind.I])
  weight = sum(times[Kind.W]) / (P * V)
  if not (forward and input_grad and weight):
    return 1
  # The last term is for overruns, one W on every device of the trip.
  trip = (P - 1) * (forward + input_grad + 2 * hop + weight)
  # Shorter blocks would end before their first microbatch is round the ring.
  ring = P * (1 + hop / min(forward, input_grad))
  least = max(math.ceil(ring), math.ceil(trip / (weight * V)))
  return _fewer_units(M // least, M, least)


def _fewer_units(count: int, M: int, least: int) -> int:
  """Returns the most units, up to `count`, of which none is smaller than `least`."""
  # A small last unit would have the trip of a large one, and little to hide it with.
  while count > 1 and M - (count - 1) * math.ceil(M / count) < least:
    count -= 1
  return max(count, 1)


def _breadth_first_time(spec: Spec) -> float:
  """Returns the makespan of looped-bfs: all forwards chunk by chunk, then all fused backwards."""
  P, S = spec.devices, spec.devices * spec.chunks
  times, hop = spec.costs.durations(S), spec.costs.hop if P > 1 else 0
  free: list[float] = [0] * P
  ready: list[float] = [-hop] * spec.microbatches
  for kind, stages in ((Kind.F, range(S)), (Kind.B, reversed(range(S)))):
    for stage in stages:
      d, duration = stage % P, times[kind][stage]
      end = free[d]
      for m, made in enumerate(ready):
        ready[m] = end = max(end, made + hop) + duration
      free[d] = end
    # Stages do not hand their own forwards over.
    ready = [made - hop for made in ready]
  return max(free)


class _Row:
  """The list of one device as it grows, and the time at which the device is free again."""

  __slots__ = ("actions", "begin", "busy", "free", "idle", "most", "pending")

  def __init__(self, most: int) -> None:
    self.actions: list[Action] = []
    # Weight gradients that may run at any time, oldest first, and the most to keep for later.
    self.pending: collections.deque[Action] = collections.deque()
    self.most = most
    self.free: float = 0
    self.busy: float = 0
    # When its first F began, and the time lost from there to its first I, before there was any W.
    self.begin: float | None = None
    self.idle: float | None = None

  def run(self, action: Action, duration: float) -> float:
    """Adds an action, and says when it ends."""
    self.actions.append(action)
    self.busy += duration
    self.free += duration
    return self.free


class _Plan:
  """Runs the blocks in an order in which whatever an action needs comes before it.

  The arrival of every input is therefore known when it is waited for, and weight gradients are put
  before it until it is there.
  """

  def __init__(self, spec: Spec, most: int) -> None:
    self.microbatches, self.hop = spec.microbatches, spec.costs.hop if spec.devices > 1 else 0
    self.placement = Placement.loop(spec.devices, spec.chunks)
    self.times = spec.costs.all_durations(self.schedule_of(()))
    self.rows = [_Row(most) for _ in self.placement.table]

  def unit(self, microbatches: range) -> None:
    """Adds a unit's forwards and input gradients, with weight gradients where devices wait."""
    S = self.placement.stages
    for d, row in enumerate(self.rows):
      self._shed(row, self._kept(d))
    for kind, stages in ((Kind.F, range(S)), (Kind.I, reversed(range(S)))):
      # The last stage's gradients wait for its own forwards, which are over.
      ready = dict.fromkeys(microbatches, float("-inf"))
      for stage in stages:
        ready = self._block(stage, kind, ready)

  def finish(self) -> None:
    """Runs the weight gradients that are left."""
    for row in self.rows:
      self._shed(row, 0)

  def makespan(self) -> float:
    """Returns the time at which the last device has ended."""
    return max(row.free for row in self.rows)

  def schedule(self) -> Schedule:
    """Returns the schedule of all that has been run."""
    return self.schedule_of(tuple(tuple(row.actions) for row in self.rows))

  def schedule_of(self, order: Order) -> Schedule:
    """Returns an order as a schedule with the family's name."""
    return Schedule("zeropp", self.placement, self.microbatches, order)

  def _kept(self, d: int) -> int:
    """Returns how many weight gradients device d keeps back for the gaps of the next unit."""
    weight = sum(self.times[Kind.W][s] for s in self.placement.table[d]) / self.placement.chunks
    row = self.rows[d]
    if not row.idle or not weight:
      return 0
    return min(math.ceil(row.idle / weight) + _SPARE, row.most)

  def _shed(self, row: _Row, most: int) -> None:
    """Runs pending weight gradients until at most so many are left."""
    while len(row.pending) > most:
      self._run(row, row.pending.popleft())

  def _run(self, row: _Row, action: Action) -> float:
    """Adds an action to a device's list, and returns when it ends."""
    return row.run(action, self.times[action.kind][action.stage])

  def _block(self, stage: int, kind: Kind, ready: dict[int, float]) -> dict[int, float]:
    """Adds one chunk's F or I of every microbatch of a unit, with the gather and the release.

    Args:
      stage: the chunk's stage.
      kind: F or I.
      ready: microbatch -> when the input of its pass is made.

    Returns:
      Microbatch -> when its pass ends.
    """
    row = self.rows[self.placement.device(stage)]
    first = next(iter(ready))
    self._run(row, Action(stage, Kind.G, first))
    ends = {}
    for m, made in ready.items():
      # Every other input comes from the neighbour; a chunk on the same device hands over in place.
      self._wait(row, made + self.hop)
      if row.begin is None:
        row.begin = row.free
      if row.idle is None and kind is Kind.I:
        row.idle = row.free - row.begin - row.busy
      ends[m] = self._run(row, Action(stage, kind, m))
      if kind is Kind.I:
        row.pending.append(Action(stage, Kind.W, m))
    row.actions.append(Action(stage, Kind.X, first))
    return ends

  def _wait(self, row: _Row, until: float) -> None:
    """Fills the time before an arrival with weight gradients; the last may overrun it."""
    while row.pending and row.free < until:
      self._run(row, row.pending.popleft())
    row.free = max(row.free, until)
