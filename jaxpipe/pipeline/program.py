"""Lowers a schedule to the integer table that the executor walks, one row a tick.

On each tick every device does at most one action, then everything that was sent arrives. The table
says, for every tick and device, what to do, which slot of which ring to read and write, and where
to put what arrives. A slot is occupied from the tick that fills it to the tick that last reads it,
and slots are handed out by interval colouring, so that the rings are exactly as long as the
schedule needs: memory is the schedule's memory.

    ring         filled by                        read by
    activations  arrival of stage s-1's output    F
    residuals    F                                I or B
    gradients    the head, or arrival of dx       I or B
    waiting      I                                W
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping

import numpy as np

from jaxpipe.schedules import Action, Kind, Schedule, ScheduleError
from jaxpipe.schedules.ticks import ticks

# What a device does on a tick, as the table's integers.
IDLE = 0
CODE = {Kind.F: 1, Kind.B: 2, Kind.I: 3, Kind.W: 4}

RINGS = ("activations", "residuals", "gradients", "waiting")
ARRIVALS = ("activations", "gradients")  # those that neighbours fill


@dataclasses.dataclass(frozen=True)
class Route:
  """All transfers over one distance round the devices.

  Attributes:
    offset: receiver minus sender, modulo P; 0 is a copy within the device.
    pairs: the (sender, receiver) pairs that ever send.
    activations: whether outputs ever travel it.
    gradients: whether input gradients ever do.
  """

  offset: int
  pairs: tuple[tuple[int, int], ...]
  activations: bool
  gradients: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """The tick table of a schedule.

  Attributes:
    name: the schedule's.
    devices, chunks, stages, microbatches: P, V, S, M.
    ticks: number of rows.
    kinds: the kinds that occur.
    slots: length of each ring, the largest need of any device.
    routes: who sends to whom.
    table: int32 [ticks, P] each: `kind`, `chunk`, `stage`, `microbatch`; the slot in each ring,
      under the ring's name; and for route r, `arriving_activation_r` and `arriving_gradient_r`.
      `slots[ring]` itself, one past the end, stands for "nowhere".
  """

  name: str
  devices: int
  chunks: int
  stages: int
  microbatches: int
  ticks: int
  kinds: frozenset[Kind]
  slots: Mapping[str, int]
  routes: tuple[Route, ...]
  table: Mapping[str, np.ndarray]

  def length(self, ring: str) -> int:
    """Slots to allocate: where neighbours write there is one more, which stands for "nowhere".

    What arrives on a tick that nobody sends is written there, in place of a conditional round
    every write.
    """
    return self.slots[ring] + (ring in ARRIVALS)


@dataclasses.dataclass(frozen=True)
class _Stay:
  """One value's stay in a ring: filled at the end of tick `start`, last read in tick `end`."""

  ring: str
  device: int
  start: int
  end: int
  stage: int
  microbatch: int


def lower(schedule: Schedule) -> Program:
  """Returns the program of a legal schedule.

  Raises:
    ScheduleError: the schedule dead-locks, or holds a kind that the executor does not run.
  """
  _refuse_strange(schedule)
  at = _at(schedule)
  stays = _stays(schedule, at)
  slot, slots = _colour(stays)
  routes = _routes(schedule)
  ticks = 1 + max(at.values())
  columns = ["kind", "chunk", "stage", "microbatch", *RINGS]
  table = {name: np.zeros((ticks, schedule.devices), np.int32) for name in columns}
  for ring in RINGS:
    table[ring][:] = slots[ring]
  for r in range(len(routes)):
    table[f"arriving_activation_{r}"] = np.full_like(table["kind"], slots["activations"])
    table[f"arriving_gradient_{r}"] = np.full_like(table["kind"], slots["gradients"])
  _fill(schedule, at, slot, routes, table)
  return Program(
    name=schedule.name,
    devices=schedule.devices,
    chunks=schedule.chunks,
    stages=schedule.stages,
    microbatches=schedule.microbatches,
    ticks=ticks,
    kinds=frozenset(a.kind for a in at),
    slots=slots,
    routes=routes,
    table=table,
  )


def _refuse_strange(schedule: Schedule) -> None:
  """Raises ScheduleError for what the executor does not run."""
  steps = [step for row in schedule.order for step in row]
  kinds = sorted({a.kind.value for step in steps for a in step.parts} - {k.value for k in CODE})
  if kinds:
    raise ScheduleError(
      f"schedule {schedule.name} has actions of kind {', '.join(kinds)}, which the"
      f" executor does not run; it runs {', '.join(CODE)}"
    )
  pair = next((step for step in steps if len(step.parts) > 1), None)
  if pair is not None:
    raise ScheduleError(
      f"schedule {schedule.name} overlaps {pair}, which the executor does not run; write its parts"
      " one after the other"
    )
  if schedule.placement.replicated or schedule.paths is not None:
    what = "stages with replicas" if schedule.placement.replicated else "paths that skip stages"
    raise ScheduleError(f"schedule {schedule.name} has {what}, which the executor does not run")


def _at(schedule: Schedule) -> dict[Action, int]:
  """The tick of each action."""
  return {
    action: tick
    for row, row_ticks in zip(schedule.order, ticks(schedule), strict=True)
    for step, tick in zip(row, row_ticks, strict=True)
    for action in step.parts
  }


def _stays(schedule: Schedule, at: Mapping[Action, int]) -> list[_Stay]:
  home, S = schedule.placement.device, schedule.stages
  stays = []

  def stay(ring: str, stage: int, m: int, start: int, end: int) -> None:
    stays.append(_Stay(ring, home(stage), start, end, stage, m))

  for action, tick in at.items():
    s, m = action.stage, action.microbatch
    if action.kind is Kind.F and s > 0:
      stay("activations", s, m, at[Action(s - 1, Kind.F, m)], tick)
    if action.kind in (Kind.I, Kind.B):
      stay("residuals", s, m, at[Action(s, Kind.F, m)], tick)
      source = at[Action(s, Kind.F, m)] if s == S - 1 else _back(at, s + 1, m)
      stay("gradients", s, m, source, tick)
    if action.kind is Kind.W:
      stay("waiting", s, m, at[Action(s, Kind.I, m)], tick)
  return stays


def _back(at: Mapping[Action, int], stage: int, m: int) -> int:
  """Tick of a stage's input gradient, fused or not."""
  fused = at.get(Action(stage, Kind.B, m))
  return at[Action(stage, Kind.I, m)] if fused is None else fused


def _colour(stays: Iterable[_Stay]) -> tuple[dict[tuple[str, int, int], int], dict[str, int]]:
  """Gives every stay a slot; two on one device and ring share a slot only one after the other.

  Returns:
    `(ring, stage, microbatch) -> slot`, and the number of slots of each ring.
  """
  slot = {}
  slots = dict.fromkeys(RINGS, 0)
  free: dict[tuple[str, int], list[int]] = {}
  busy: dict[tuple[str, int], list[tuple[int, int]]] = {}
  for stay in sorted(stays, key=lambda stay: (stay.start, stay.end, stay.stage, stay.microbatch)):
    where = (stay.ring, stay.device)
    idle, running = free.setdefault(where, []), busy.setdefault(where, [])
    # A tick reads before it writes, so a slot last read in tick t may be filled at the end of t.
    while running and running[0][0] <= stay.start:
      heapq.heappush(idle, heapq.heappop(running)[1])
    number = heapq.heappop(idle) if idle else len(running)
    heapq.heappush(running, (stay.end, number))
    slot[stay.ring, stay.stage, stay.microbatch] = number
    slots[stay.ring] = max(slots[stay.ring], number + 1)
  return slot, slots


def _neighbours(schedule: Schedule) -> Iterable[tuple[Kind, int, int]]:
  """Every edge between stages: what travels, from which stage, to which."""
  backward = any(
    a.kind in (Kind.I, Kind.B) for row in schedule.order for step in row for a in step.parts
  )
  for s in range(schedule.stages - 1):
    yield Kind.F, s, s + 1
    if backward:
      yield Kind.I, s + 1, s


def _routes(schedule: Schedule) -> tuple[Route, ...]:
  home, P = schedule.placement.device, schedule.devices
  travels: dict[int, set[tuple[Kind, int, int]]] = {}
  for kind, source, target in _neighbours(schedule):
    a, b = home(source), home(target)
    travels.setdefault((b - a) % P, set()).add((kind, a, b))
  return tuple(
    Route(
      offset,
      tuple(sorted({(a, b) for _, a, b in edges})),
      any(kind is Kind.F for kind, _, _ in edges),
      any(kind is Kind.I for kind, _, _ in edges),
    )
    for offset, edges in sorted(travels.items())
  )


def _fill(
  schedule: Schedule,
  at: Mapping[Action, int],
  slot: Mapping[tuple[str, int, int], int],
  routes: tuple[Route, ...],
  table: Mapping[str, np.ndarray],
) -> None:
  home, P, S = schedule.placement.device, schedule.devices, schedule.stages
  number = {route.offset: r for r, route in enumerate(routes)}

  def send(what: str, ring: str, tick: int, source: int, target: int, m: int) -> None:
    a, b = home(source), home(target)
    table[f"arriving_{what}_{number[(b - a) % P]}"][tick, b] = slot[ring, target, m]

  for action, tick in at.items():
    s, m, d = action.stage, action.microbatch, home(action.stage)
    cell = (tick, d)
    table["kind"][cell] = CODE[action.kind]
    table["chunk"][cell] = schedule.placement.chunk(d, s)
    table["stage"][cell] = s
    table["microbatch"][cell] = m
    for ring in RINGS:
      if (ring, s, m) in slot:
        table[ring][cell] = slot[ring, s, m]
    if action.kind is Kind.F and s < S - 1:
      send("activation", "activations", tick, s, s + 1, m)
    if action.kind in (Kind.I, Kind.B) and s > 0:
      send("gradient", "gradients", tick, s, s - 1, m)
