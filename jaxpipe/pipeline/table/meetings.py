"""Where all devices meet over one microbatch, when each holds a shard of the vocabulary.

    embedding           the microbatch enters: each shard looks its tokens up, the sum is x
    output              it has left the last stage: y goes to every shard
    barrier             all its S passes are done: loss, and the gradient of y
    embedding_gradient  dx of the first stage goes to every shard

A meeting is a collective: all devices take part, whatever else the tick has for them. Where two
microbatches meet on one tick (two pipelines in opposite directions), there are two columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping

import numpy as np

from jaxpipe.schedules import Action, Kind, Schedule

EMBEDDING, OUTPUT, BARRIER, EMBEDDING_GRADIENT = (
  "embedding",
  "output",
  "barrier",
  "embedding_gradient",
)


@dataclasses.dataclass(frozen=True)
class Meetings:
  """Columns of the tick table beside what each device does.

  Attributes:
    microbatches: `embedding_0`, `output_0`, ...: int32 [ticks], the microbatch, or -1.
    slots: int32 [ticks, P], what differs by device. Where a microbatch's ring `vocabulary` lies:
      `output_0_slot`, `barrier_0_slot`. Where the one device that wants the result puts it, all
      others nowhere: `embedding_0_slot` in `activations`, `barrier_0_gradient` in `gradients`.
    home: int32 [ticks, P], 1 on the device that has what is sent to all: `output_0_home`,
      `embedding_gradient_0_home`.
  """

  microbatches: dict[str, np.ndarray]
  slots: dict[str, np.ndarray]
  home: dict[str, np.ndarray]

  def of(self, name: str) -> list[str]:
    """The columns of one kind of meeting."""
    return [column for column in self.microbatches if column.rpartition("_")[0] == name]


def barriers(at: Mapping[Action, tuple[int, int]]) -> dict[int, int]:
  """Microbatch -> the tick at whose end all its S passes are done."""
  met: dict[int, int] = {}
  for action, (_, tick) in at.items():
    if action.kind is Kind.S:
      met[action.microbatch] = max(met.get(action.microbatch, 0), tick)
  return met


def find_meetings(
  schedule: Schedule,
  at: Mapping[Action, tuple[int, int]],
  slot: Mapping[Hashable, int],
  shape: tuple[int, int],
  slots: Mapping[str, int],
) -> Meetings:
  """Returns the meetings of a schedule; none where the last stage holds the whole vocabulary.

  Args:
    schedule, at: what runs, on which device and tick.
    slot, slots: of the rings; see `colour`.
    shape: [ticks, P].
  """
  found = Meetings({}, {}, {})
  for name, by_tick in _by_tick(schedule, at).items():
    for tick, microbatches in by_tick.items():
      for k, m in enumerate(microbatches):
        _enter(found, f"{name}_{k}", tick, m, schedule, at, slot, shape, slots)
  return found


def _enter(
  found: Meetings,
  column: str,
  tick: int,
  m: int,
  schedule: Schedule,
  at: Mapping[Action, tuple[int, int]],
  slot: Mapping[Hashable, int],
  shape: tuple[int, int],
  slots: Mapping[str, int],
) -> None:
  """Notes one meeting in the columns that it has."""
  name = column.rpartition("_")[0]
  path = schedule.path(m)
  end = path[0] if name in (EMBEDDING, EMBEDDING_GRADIENT) else path[-1]
  home = at[Action(end, Kind.F, m)][0]
  found.microbatches.setdefault(column, np.full(shape[0], -1, np.int32))[tick] = m
  row = lambda columns, key, fill: columns.setdefault(key, np.full(shape, fill, np.int32))[tick]  # noqa: E731
  if name in (OUTPUT, BARRIER):
    held = [slot["vocabulary", d, (m,)] for d in range(shape[1])]
    row(found.slots, f"{column}_slot", slots["vocabulary"])[:] = held
  if name in (OUTPUT, EMBEDDING_GRADIENT):
    row(found.home, f"{column}_home", 0)[home] = 1
  nowhere = slots["activations"], slots["gradients"]
  if name == EMBEDDING:
    row(found.slots, f"{column}_slot", nowhere[0])[home] = slot["activations", home, (end, m)]
  if name == BARRIER:
    gradient = slot.get(("gradients", home, (end, m)), nowhere[1])
    row(found.slots, f"{column}_gradient", nowhere[1])[home] = gradient


def _by_tick(
  schedule: Schedule, at: Mapping[Action, tuple[int, int]]
) -> dict[str, dict[int, list[int]]]:
  """Meeting -> tick -> its microbatches."""
  found: dict[str, dict[int, list[int]]] = {
    name: {} for name in (EMBEDDING, OUTPUT, BARRIER, EMBEDDING_GRADIENT)
  }
  if not schedule.vocabulary:
    return found
  for action, (_, tick) in at.items():
    path, s, m = schedule.path(action.microbatch), action.stage, action.microbatch
    if action.kind is Kind.F and s == path[0]:
      found[EMBEDDING].setdefault(tick, []).append(m)
    if action.kind is Kind.F and s == path[-1]:
      found[OUTPUT].setdefault(tick, []).append(m)
    if action.kind in (Kind.I, Kind.B) and s == path[0]:
      found[EMBEDDING_GRADIENT].setdefault(tick, []).append(m)
  for m, tick in barriers(at).items():
    found[BARRIER].setdefault(tick, []).append(m)
  return found
