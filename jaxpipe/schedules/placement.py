"""Which device holds which stage.

A placement is a table with one row per device: the stages it holds, in chunk order.  `loop` is
Megatron's (Narayanan et al., 2021, arXiv:2104.04473), `v` is the fold of ZB-V (Qi et al., 2023,
arXiv:2401.10241). A new placement is one function here and one line in `PLACEMENTS`.

  loop, P=2, V=2            v, P=2
  device 0: stages 0 2      device 0: stages 0 3
  device 1: stages 1 3      device 1: stages 1 2
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from jaxpipe.schedules.actions import Action, ScheduleError


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the stages of a model live.

  Attributes:
    table: `table[d][v]` is the stage that device d holds as its chunk v.
    name: what to call the placement; equal tables are equal whatever their names.
  """

  table: tuple[tuple[int, ...], ...]
  name: str = dataclasses.field(default="table", compare=False)

  def __post_init__(self) -> None:
    # Lists are welcome, but a frozen value must be hashable.
    object.__setattr__(self, "table", tuple(tuple(row) for row in self.table))
    if not self.table or not self.table[0]:
      raise ScheduleError("a placement needs at least one device that holds at least one stage")
    for d, row in enumerate(self.table):
      # Devices stack their chunks' parameters along one dim, so all hold equally many.
      if len(row) != self.chunks:
        raise ScheduleError(
          f"device {d} holds {len(row)} stages and device 0 holds {self.chunks};"
          " give every device the same number"
        )
    # Once: a bidirectional placement, which holds every stage twice, will relax this line and
    # `device`; what runs where is otherwise always asked of the table's rows.
    if sorted(stage for row in self.table for stage in row) != list(range(self.stages)):
      raise ScheduleError(
        f"{self.devices} devices of {self.chunks} chunks must hold each of the stages"
        f" 0..{self.stages - 1} once, not {[list(row) for row in self.table]}"
      )

  @property
  def devices(self) -> int:
    """Number of devices, P."""
    return len(self.table)

  @property
  def chunks(self) -> int:
    """Number of stages that each device holds, V."""
    return len(self.table[0])

  @property
  def stages(self) -> int:
    """Number of stages, S."""
    return self.devices * self.chunks

  def stage(self, device: int, chunk: int) -> int:
    """The stage that `device` holds as its `chunk`."""
    return self.table[device][chunk]

  def device(self, stage: int) -> int:
    """The device that holds `stage`."""
    return self._home[stage][0]

  def chunk(self, stage: int) -> int:
    """Which of its device's chunks `stage` is."""
    return self._home[stage][1]

  @functools.cached_property
  def _home(self) -> dict[int, tuple[int, int]]:
    return {stage: (d, v) for d, row in enumerate(self.table) for v, stage in enumerate(row)}

  @classmethod
  def loop(cls, devices: int, chunks: int = 1) -> Self:
    """Stage s lives on device s % P: the model goes round the ring V times."""
    return cls(tuple(tuple(range(d, devices * chunks, devices)) for d in range(devices)), "loop")

  @classmethod
  def v(cls, devices: int, chunks: int = 2) -> Self:
    """Device r holds stages r and 2P-1-r: down the devices and back up again."""
    if chunks != 2:
      raise ScheduleError(f"a V has 2 chunks on every device, not {chunks}; use chunks=2")
    return cls(tuple((d, 2 * devices - 1 - d) for d in range(devices)), "v")

  @classmethod
  def named(cls, name: str, devices: int, chunks: int) -> "Placement":
    """The placement called `name`, for P devices with V chunks each."""
    if name not in PLACEMENTS:
      raise ScheduleError(f"unknown placement {name!r}; known: {', '.join(PLACEMENTS)}")
    return PLACEMENTS[name](devices, chunks)

  @classmethod
  def from_rows(cls, order: Sequence[Iterable[Action]]) -> "Placement":
    """Reads a placement off a schedule: a stage lives where most of its actions are.

    The majority decides, so that one misplaced action is found to be misplaced rather than to
    contradict the placement.

    Args:
      order: one row of actions per device.

    Returns:
      The placement, under its name if it has one.

    Raises:
      ScheduleError: devices hold different numbers of stages, or a stage is missing.
    """
    votes: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for d, row in enumerate(order):
      for action in row:
        votes[action.stage][d] += 1
    table: list[list[int]] = [[] for _ in order]
    # Ascending is the order of chunks in every known placement: lower stages come first.
    for stage in sorted(votes):
      table[votes[stage].most_common(1)[0][0]].append(stage)
    found = cls(tuple(map(tuple, table)))
    # With one device the two coincide; the one that exists for any number of chunks comes last.
    if found.chunks == 2 and found == cls.v(found.devices):
      return cls.v(found.devices)
    loop = cls.loop(found.devices, found.chunks)
    return loop if found == loop else found


# Every constructor takes P and V, so that names from files and flags need no special cases.
PLACEMENTS: dict[str, Callable[[int, int], Placement]] = {
  "loop": Placement.loop,
  "v": Placement.v,
}
