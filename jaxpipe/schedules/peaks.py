"""The most that each device holds at once.

A device does one thing at a time, so its own list decides; times play no part.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxpipe.schedules.actions import Action, Kind
from jaxpipe.schedules.costs import Memory, memory_changes

if TYPE_CHECKING:
  from jaxpipe.schedules.schedule import Schedule

# Counted in chunks whatever `memory` says: a chunk is held until its weight gradient is done, for
# W needs the layer inputs that F kept.
_ACTIVATIONS = {Kind.F: 1, Kind.W: -1, Kind.B: -1}
# A fused B never leaves a weight gradient pending.
_PENDING = {Kind.I: 1, Kind.W: -1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
  """The most of each kind that each device holds.

  Attributes:
    activations: chunks, from F until W or B.
    pending_weight_grads: chunks whose I is done and whose W is not.
    memory: in the unit of the changes that were asked about.
  """

  activations: tuple[int, ...]
  pending_weight_grads: tuple[int, ...]
  memory: tuple[float, ...]


def peaks(schedule: Schedule, memory: Memory = (1, 0, -1)) -> Peaks:
  """Counts what each device holds at most.

  Args:
    schedule: any.
    memory: what an F, an I and a W (and an R) change in what a device holds, each a number or a
      sequence by stage. A fused B changes it by I + W at once; other kinds do not change it.

  Raises:
    ValueError: a sequence has not one entry per stage.
  """
  changes = memory_changes(memory, schedule.stages)
  rows = [[action for step in row for action in step.parts] for row in schedule.order]
  return Peaks(
    activations=tuple(_highest(row, _ACTIVATIONS) for row in rows),
    pending_weight_grads=tuple(_highest(row, _PENDING) for row in rows),
    memory=tuple(_highest_by_stage(row, changes) for row in rows),
  )


# Starting from nothing held keeps a peak from being negative.
def _highest(row: list[Action], changes: Mapping[Kind, int]) -> int:
  return max(itertools.accumulate((changes.get(a.kind, 0) for a in row), initial=0))


def _highest_by_stage(row: list[Action], changes: Mapping[Kind, tuple[float, ...]]) -> float:
  steps = (changes[a.kind][a.stage] for a in row if a.kind in changes)
  return max(itertools.accumulate(steps, initial=0))
