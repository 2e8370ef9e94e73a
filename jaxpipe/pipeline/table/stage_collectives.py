"""The collectives over all stages that a vocabulary cut over the stages needs, tick by tick.

Where every device holds a shard of the embedding's and the head's table, a few steps of each
microbatch need all devices at once. Each is a *stage collective*: a collective over the mesh axis
`stage` that all devices enter on the same tick, whatever other action the tick has for them.

    embedding           the microbatch enters: each shard looks its tokens up, and the sum is x
    output              it has left the last stage: its output y goes to every shard of the head
    barrier             all its S passes are done: the loss, and the gradient of y
    embedding_gradient  I or B of its first stage is done: dx goes to every shard of the embedding

Every kind has columns of its own in the tick table. Where two microbatches have the same collective
on one tick (two pipelines in opposite directions), there are two columns, `output_0` and
`output_1`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxpipe.pipeline.table.slots import Slots
from jaxpipe.schedules import Action, Kind, Schedule

EMBEDDING, OUTPUT, BARRIER, EMBEDDING_GRADIENT = (
  "embedding",
  "output",
  "barrier",
  "embedding_gradient",
)


@dataclasses.dataclass(frozen=True)
class StageCollectives:
  """Columns of the tick table beside those for each device's action.

  A column is named by its collective and a number, such as `embedding_0`. The *home* of a
  collective is the device that sends what all receive, or that keeps the result for its stage.

  Attributes:
    microbatches: column -> int32 [ticks], the microbatch of the tick's collective, or -1 where
      there is none. It is the same on all devices.
    slots: name -> int32 [ticks, P], slots of rings, which differ by device.
      `output_0_slot`, `barrier_0_slot`: of the microbatch in the ring `vocabulary`, on every
      device.
      `embedding_0_slot`: of the sum in `activations` at home, nowhere on other devices.
      `barrier_0_gradient`: of the gradient of y in `gradients` at home, nowhere on other devices.
    home: `output_0_home` and `embedding_gradient_0_home` -> int32 [ticks, P], 1 on the device that
      sends, else 0.
  """

  microbatches: dict[str, np.ndarray]
  slots: dict[str, np.ndarray]
  home: dict[str, np.ndarray]

  def of(self, name: str) -> list[str]:
    """Returns the columns of one kind of collective, such as `embedding`."""
    return [column for column in self.microbatches if column.rpartition("_")[0] == name]


def barriers(at: Mapping[Action, tuple[int, int]]) -> dict[int, int]:
  """Returns microbatch -> the tick at whose end all its S passes are done.

  Args:
    at: action -> (device, tick).
  """
  done: dict[int, int] = {}
  for action, (_, tick) in at.items():
    if action.kind is Kind.S:
      done[action.microbatch] = max(done.get(action.microbatch, 0), tick)
  return done


def find_collectives(
  schedule: Schedule,
  at: Mapping[Action, tuple[int, int]],
  slots: Slots,
  shape: tuple[int, int],
) -> StageCollectives:
  """Returns the stage collectives of a schedule; none where the last stage has the whole head.

  Args:
    schedule: what runs.
    at: action -> (device, tick).
    slots: of the rings.
    shape: [ticks, P].
  """
  found = StageCollectives({}, {}, {})

  def row(columns: dict[str, np.ndarray], name: str, fill: int, tick: int) -> np.ndarray:
    """The tick's row [P] of a column, which is made, full of `fill`, when it is first asked for."""
    return columns.setdefault(name, np.full(shape, fill, np.int32))[tick]

  for column, tick, m in _occurrences(schedule, at):
    name, path = column.rpartition("_")[0], schedule.path(m)
    # The stage whose device is home: F of the first stage wants x and its I has dx; F of the last
    # stage has y and its I wants the gradient.
    end = path[0] if name in (EMBEDDING, EMBEDDING_GRADIENT) else path[-1]
    home = at[Action(end, Kind.F, m)][0]
    found.microbatches.setdefault(column, np.full(shape[0], -1, np.int32))[tick] = m
    if name in (OUTPUT, BARRIER):
      held = [slots.number["vocabulary", d, (m,)] for d in range(shape[1])]
      row(found.slots, f"{column}_slot", slots.count["vocabulary"], tick)[:] = held
    if name in (OUTPUT, EMBEDDING_GRADIENT):
      row(found.home, f"{column}_home", 0, tick)[home] = 1
    if name == EMBEDDING:
      slot = slots.number["activations", home, (end, m)]
      row(found.slots, f"{column}_slot", slots.count["activations"], tick)[home] = slot
    if name == BARRIER:
      # Nowhere too where only forwards run, and no gradient is waited for.
      slot = slots.of("gradients", home, (end, m))
      row(found.slots, f"{column}_gradient", slots.count["gradients"], tick)[home] = slot
  return found


def _occurrences(
  schedule: Schedule, at: Mapping[Action, tuple[int, int]]
) -> list[tuple[str, int, int]]:
  """Returns (column, tick, microbatch) of every stage collective, by kind and then by tick."""
  by_tick: dict[str, dict[int, list[int]]] = {
    name: {} for name in (EMBEDDING, OUTPUT, BARRIER, EMBEDDING_GRADIENT)
  }
  if not schedule.vocabulary:
    return []  # both ends are whole, on the devices of the first and the last stage
  for action, (_, tick) in at.items():
    path, s, m = schedule.path(action.microbatch), action.stage, action.microbatch
    if action.kind is Kind.F and s == path[0]:
      by_tick[EMBEDDING].setdefault(tick, []).append(m)
    if action.kind is Kind.F and s == path[-1]:
      by_tick[OUTPUT].setdefault(tick, []).append(m)
    if action.kind in (Kind.I, Kind.B) and s == path[0]:
      by_tick[EMBEDDING_GRADIENT].setdefault(tick, []).append(m)
  for m, tick in barriers(at).items():
    by_tick[BARRIER].setdefault(tick, []).append(m)
  return [
    (f"{name}_{k}", tick, m)
    for name, ticks in by_tick.items()
    for tick, microbatches in ticks.items()
    for k, m in enumerate(microbatches)
  ]
