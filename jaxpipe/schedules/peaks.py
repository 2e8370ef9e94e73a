"""Counts the most that each device holds at once: chunks, pending weight gradients, memory.

A device does one thing at a time, so its own list decides; times play no part.

  list of a device        F0 F1 I0 F2 W0 I1 W1 ...
  chunks held             1  2  2  3  2  2  1
  weight gradients due    0  0  1  1  0  1  0
"""

import dataclasses
import itertools
from collections.abc import Mapping

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.costs import Memory, memory_changes
from jaxpipe.schedules.kinds import CHUNKS_HELD, Kind
from jaxpipe.schedules.schedule import Schedule

# Like `CHUNKS_HELD`, for weight gradients whose input gradient is done.
_PENDING = {kind: kind.info.pending_weight_grads for kind in Kind if kind.info.pending_weight_grads}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
  """The most that each device holds at any moment.

  Attributes:
    activations: P numbers of chunks, each of one microbatch, held from F until W or B.
    pending_weight_grads: P numbers of chunks whose I is done and whose W is not.
    memory: P amounts, in the unit of the changes that `peaks` was given.
  """

  activations: tuple[int, ...]
  pending_weight_grads: tuple[int, ...]
  memory: tuple[float, ...]


def peaks(schedule: Schedule, memory: Memory = (1, 0, -1)) -> Peaks:
  """Counts the most that each device of a schedule holds.

  Args:
    schedule: a schedule, legal or not.
    memory: changes of the memory that a device holds by an F, an I and a W (and an R), each a
      number or a sequence by stage. A fused B changes it by I + W at once; other kinds do not
      change it.

  Raises:
    ValueError: a sequence has not one entry per stage.
  """
  changes = memory_changes(memory, schedule.stages)
  rows = [[action for step in row for action in step.parts] for row in schedule.order]
  return Peaks(
    activations=tuple(_highest(row, CHUNKS_HELD) for row in rows),
    pending_weight_grads=tuple(_highest(row, _PENDING) for row in rows),
    memory=tuple(_highest_by_stage(row, changes) for row in rows),
  )


# Starting from nothing held keeps a peak from being negative.
def _highest(row: list[Action], changes: Mapping[Kind, int]) -> int:
  """Returns the highest sum of the changes of a list's actions, up to some place in it."""
  return max(itertools.accumulate((changes.get(a.kind, 0) for a in row), initial=0))


def _highest_by_stage(row: list[Action], changes: Mapping[Kind, tuple[float, ...]]) -> float:
  """Returns the same highest sum for changes that differ by stage."""
  steps = (changes[a.kind][a.stage] for a in row if a.kind in changes)
  return max(itertools.accumulate(steps, initial=0))
