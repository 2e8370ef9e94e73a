"""Placements of stages on devices: which device holds which stage.

A placement is a table with one row per device: the stages it holds, in chunk order. `loop` is
Megatron's (Narayanan et al., 2021, arXiv:2104.04473), `v` the fold of ZB-V (Qi et al., 2023,
arXiv:2401.10241), `wave` Hanayo's repetition of it (Liu et al., 2023, arXiv:2308.15762), and
`mirrored` holds every stage twice, for pipelines that run in both directions at once (Chimera: Li
and Hoefler, 2021, arXiv:2107.06925). A new placement is one function and one line in `PLACEMENTS`.

            loop, V=2   v      wave, V=4   mirrored, V=2   mirrored, V=4
  device 0: 0 2         0 3    0 3 4 7     0 1             0 1 3 2
  device 1: 1 3         1 2    1 2 5 6     1 0             1 0 2 3
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from jaxpipe.schedules.actions import Order, ScheduleError
from jaxpipe.schedules.kinds import STAGE_KINDS


@dataclasses.dataclass(frozen=True)
class Placement:
  """The device or devices that hold each stage of a model.

  Attributes:
    table: P rows of V stages: `table[d][v]` is the stage that device d holds as its chunk v.
    name: name of the placement in messages; equal tables are equal whatever their names.
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
      # A device has one copy of a stage's weights; two chunks of them would be two copies.
      if len(set(row)) < len(row):
        raise ScheduleError(f"device {d} holds a stage twice: {list(row)}")
    held = sorted({stage for row in self.table for stage in row})
    if len(held) < self.stages:
      absent = next(i for i, stage in enumerate(held) if i != stage)
      raise ScheduleError(
        f"no device holds stage {absent}, although stage {self.stages - 1} exists:"
        f" {[list(row) for row in self.table]}"
      )

  @property
  def devices(self) -> int:
    """Number of devices, P."""
    return len(self.table)

  @property
  def chunks(self) -> int:
    """Number of stages that each device holds, V."""
    return len(self.table[0])

  @functools.cached_property
  def stages(self) -> int:
    """Number of stages, S."""
    return 1 + max(stage for row in self.table for stage in row)

  @property
  def replicated(self) -> bool:
    """Whether some stage lives on more than one device."""
    return self.stages < self.devices * self.chunks

  def stage(self, device: int, chunk: int) -> int:
    """Returns the stage that `device` holds as its `chunk`."""
    return self.table[device][chunk]

  def homes(self, stage: int) -> tuple[int, ...]:
    """Returns the devices that hold `stage`, ascending: one, or two where it has replicas."""
    return self._homes[stage]

  def device(self, stage: int) -> int:
    """Returns the device that holds `stage`.

    Raises:
      ScheduleError: it lives on several.
    """
    homes = self._homes[stage]
    if len(homes) > 1:
      raise ScheduleError(f"stage {stage} lives on devices {homes}; ask which microbatch")
    return homes[0]

  def chunk(self, device: int, stage: int) -> int:
    """Returns the number among the chunks of `device` that `stage` has there."""
    return self._chunks[device, stage]

  @functools.cached_property
  def _homes(self) -> dict[int, tuple[int, ...]]:
    """The devices of each stage."""
    homes: dict[int, tuple[int, ...]] = {}
    for d, row in enumerate(self.table):
      for stage in row:
        homes[stage] = (*homes.get(stage, ()), d)
    return homes

  @functools.cached_property
  def _chunks(self) -> dict[tuple[int, int], int]:
    """The chunk number of each (device, stage)."""
    return {(d, stage): v for d, row in enumerate(self.table) for v, stage in enumerate(row)}

  @classmethod
  def loop(cls, devices: int, chunks: int = 1) -> Self:
    """Places stage s on device s % P: the model goes round the ring V times."""
    return cls(tuple(tuple(range(d, devices * chunks, devices)) for d in range(devices)), "loop")

  @classmethod
  def v(cls, devices: int, chunks: int = 2) -> Self:
    """Places stages r and 2P-1-r on device r: down the devices and back up again."""
    if chunks != 2:
      raise ScheduleError(f"a V has 2 chunks on every device, not {chunks}; use chunks=2")
    return cls(tuple((d, 2 * devices - 1 - d) for d in range(devices)), "v")

  @classmethod
  def wave(cls, devices: int, chunks: int) -> Self:
    """Places the stages down the devices, up again, and so on: a zigzag of V runs."""
    P = devices
    return cls(
      tuple(
        tuple(v * P + (d if v % 2 == 0 else P - 1 - d) for v in range(chunks)) for d in range(P)
      ),
      "wave",
    )

  @classmethod
  def mirrored(cls, devices: int, chunks: int = 2) -> Self:
    """Places two replicas: a wave of V/2 runs from device 0, its mirror image from device P-1.

    Even chunks belong to the first replica, odd ones to the second.
    """
    if devices % 2 or chunks % 2:
      raise ScheduleError(
        f"two mirrored replicas need even numbers, not {devices} devices with {chunks} chunks;"
        f" use devices={devices + devices % 2}, chunks={chunks + chunks % 2}"
      )
    down = cls.wave(devices, chunks // 2).table
    return cls(
      tuple(
        tuple(stage for pair in zip(down[d], down[devices - 1 - d], strict=True) for stage in pair)
        for d in range(devices)
      ),
      "mirrored",
    )

  @classmethod
  def named(cls, name: str, devices: int, stages: int) -> "Placement":
    """Returns the placement called `name` of S stages on P devices.

    Raises:
      ScheduleError: no placement has the name, or the stages cannot fill the devices evenly.
    """
    if name not in PLACEMENTS:
      raise ScheduleError(f"unknown placement {name!r}; known: {', '.join(PLACEMENTS)}")
    make, replicas = PLACEMENTS[name]
    if stages * replicas % devices:
      raise ScheduleError(
        f"{stages} stages cannot fill {devices} devices evenly; give one row of tokens per device"
        " and a multiple of that many stages"
      )
    return make(devices, stages * replicas // devices)

  @classmethod
  def from_rows(cls, order: Order) -> "Placement":
    """Reads a placement off the lists of a schedule.

    A stage goes to each device that runs most of some microbatch's passes through it. By majority,
    so that a single misplaced action is reported as misplaced, and does not contradict the
    placement.

    Args:
      order: one row of actions per device.

    Returns:
      The placement, under its name if it has one.

    Raises:
      ScheduleError: devices hold different numbers of stages, or a stage is missing.
    """
    rows: list[set[int]] = [set() for _ in order]
    for stage, d in _majorities(order):
      rows[d].add(stage)
    # Ascending is the order of chunks in every named placement but the mirrored one.
    return cls.of_table([sorted(row) for row in rows])

  @classmethod
  def of_table(cls, table: Sequence[Sequence[int]]) -> "Placement":
    """Returns the named placement whose devices hold these stages, in whichever chunk order.

    Args:
      table: one row of stages per device.

    Returns:
      A placement of exactly this table where no named one holds the same stages.
    """
    found = cls(tuple(map(tuple, table)))
    held = tuple(tuple(sorted(row)) for row in found.table)
    # Where two coincide, the simpler name comes first: a V is a wave, one device is a loop.
    for name in ("loop", "v", "wave", "mirrored"):
      try:
        named = cls.named(name, found.devices, found.stages)
      except ScheduleError:
        continue
      if held == tuple(tuple(sorted(row)) for row in named.table):
        return named
    return found


def _majorities(order: Order) -> Iterator[tuple[int, int]]:
  """Yields (stage, device) for every stage and microbatch, by the majority of its passes there."""
  votes: dict[tuple[int, int], collections.Counter[int]] = {}
  overall: dict[int, collections.Counter[int]] = {}
  for d, row in enumerate(order):
    for step in row:
      for action in step.parts:
        if action.kind in STAGE_KINDS:
          key = (action.stage, action.microbatch)
          votes.setdefault(key, collections.Counter())[d] += 1
          overall.setdefault(action.stage, collections.Counter())[d] += 1
  for (stage, _), count in votes.items():
    # A forward here and a backward there are no majority; the stage's other microbatches decide.
    yield stage, max(count, key=lambda d: (count[d], overall[stage][d], -d))


# Every constructor takes P and V, so that names from files and flags need no special cases; beside
# it, how many devices hold each stage.
PLACEMENTS: dict[str, tuple[Callable[[int, int], Placement], int]] = {
  "loop": (Placement.loop, 1),
  "v": (Placement.v, 1),
  "wave": (Placement.wave, 1),
  "mirrored": (Placement.mirrored, 2),
}
