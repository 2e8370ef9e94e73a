"""The value that is passed around: a schedule, that is, what each device does, in which order.

It can be built by name (`make_schedule`), read from a file (`interchange`), or written by hand as
lists of tokens. Checks, simulator, drawings and executor take any of them, whatever made it.

  tokens()   [["0F0", "0F1", "0B0", "0B1"],      device 0, which holds stage 0
              ["1F0", "1B0", "1F1", "1B1"]]      device 1, which holds stage 1
"""

import dataclasses
from collections.abc import Container, Sequence
from typing import Self

from jaxpipe.schedules.actions import Action, Order, ScheduleError, Step, parse_step
from jaxpipe.schedules.checks.legal import check
from jaxpipe.schedules.kinds import STAGE_KINDS, Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.protocol import Paths, Ticks
from jaxpipe.schedules.ticks import early_ticks, whole_numbers


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One training step's work, in order.

  Building one directly does not check it; `from_tokens` and `make_schedule` do.

  Attributes:
    name: its name in files, drawings and messages.
    placement: which device holds which stage.
    microbatches: number of microbatches, M.
    order: `order[d]` is the list of device d, first step to last; P lists.
    paths: the stages that each microbatch visits, in order; None where all visit all in ascending
      order.
    vocabulary: barriers round an output layer that is sharded over all devices (S and T passes): 1
      or 2; 0 where the last stage holds it whole.
    ticks: `ticks[d][i]` is the tick of the i-th step of device d's list where one program runs on
      all devices; None where each is as early as it can be (see `ticks`).
  """

  name: str
  placement: Placement
  microbatches: int
  order: Order
  paths: Paths | None = None
  vocabulary: int = 0
  ticks: Ticks | None = None

  @property
  def devices(self) -> int:
    """Number of devices, P."""
    return self.placement.devices

  @property
  def chunks(self) -> int:
    """Number of stages that each device holds, V."""
    return self.placement.chunks

  @property
  def stages(self) -> int:
    """Number of stages, S."""
    return self.placement.stages

  def path(self, microbatch: int) -> tuple[int, ...]:
    """Returns the stages that a microbatch visits, in order."""
    if self.paths is None or microbatch >= len(self.paths):
      return tuple(range(self.stages))
    return self.paths[microbatch]

  def tokens(self) -> list[list[str]]:
    """Returns one list of tokens per device, each an action or an overlapped pair of actions."""
    return [[str(step) for step in row] for row in self.order]

  def check(self) -> Self:
    """Returns this schedule if it is a legal training step, else raises ScheduleError."""
    check(self)
    return self

  # Under the same name and placement, so that parameters placed for training serve as they are.
  def forward_only(self) -> Self:
    """Returns the schedule of the forward passes alone, in the order that they have here.

    Kept are F, and S where the vocabulary is sharded. The result always runs to the end: forwards
    wait for forwards only, so leaving the rest out of a legal schedule cannot block it. Ticks are
    early, for forwards are of one kind wherever they stand.
    """
    return dataclasses.replace(self.of_kinds({Kind.F, Kind.S}), ticks=None)

  def of_kinds(self, kinds: Container[Kind]) -> Self:
    """Returns the schedule of the actions of some kinds alone, with pairs as two actions.

    Ticks that it has stay, but that one on which a pair runs becomes two for all devices.
    """
    rows = [[[a for a in step.parts if a.kind in kinds] for step in row] for row in self.order]
    order = tuple(tuple(action for step in row for action in step) for row in rows)
    if self.ticks is None:
      return dataclasses.replace(self, order=order)
    longest: dict[int, int] = {}  # tick -> the most actions of a step on it
    for row, at in zip(rows, self.ticks, strict=True):
      for step, tick in zip(row, at, strict=True):
        longest[tick] = max(longest.get(tick, 1), len(step))
    moved, late = {}, 0
    for tick in sorted(longest):
      moved[tick] = tick + late
      late += longest[tick] - 1
    ticks = tuple(
      tuple(moved[tick] + n for step, tick in zip(row, at, strict=True) for n in range(len(step)))
      for row, at in zip(rows, self.ticks, strict=True)
    )
    return dataclasses.replace(self, order=order, ticks=ticks)

  def with_order(self, order: Order) -> Self:
    """Returns the schedule with other lists.

    Raises:
      ScheduleError: it has ticks, which belong to its own lists.
    """
    if order == self.order:
      return self
    if self.ticks is not None:
      raise ScheduleError(
        f"schedule {self.name} has ticks of its own, which would not fit other lists; leave out"
        " what changes its lists (backward, vocabulary passes, fillers, optimizer actions), or its"
        " ticks"
      )
    return dataclasses.replace(self, order=order)

  def with_ticks(self, ticks: Sequence[Sequence[int]]) -> Self:
    """Returns the schedule with ticks of its own; with None if they are as early as can be.

    Args:
      ticks: whole numbers, one for each step of each list.

    Raises:
      ScheduleError: they are no such numbers, or a step would come before what it needs.
    """
    own = dataclasses.replace(self, ticks=whole_numbers(ticks)).check()
    return dataclasses.replace(self, ticks=None if own.ticks == early_ticks(self) else own.ticks)

  @classmethod
  def from_tokens(
    cls,
    tokens: Sequence[Sequence[str]],
    placement: str | Placement = "loop",
    *,
    name: str = "custom",
    paths: Sequence[Sequence[int]] | None = None,
    vocabulary: int | None = None,
    ticks: Sequence[Sequence[int]] | None = None,
  ) -> Self:
    """Reads a schedule from text and checks it.

    Args:
      tokens: one list of tokens per device; the numbers of stages and microbatches are read off
        them.
      placement: a placement, the name of one (`loop`, `v`, `wave`, `mirrored`), or `rows` to read
        it off the lists.
      name: name of the schedule.
      paths: the stages that each microbatch visits, where not all visit all.
      vocabulary: barriers round the output layer; by default 1 if there are S passes.
      ticks: the tick of every token where one program runs on all devices, numbers that rise in
        each list; by default each is as early as it can be.

    Returns:
      The schedule; without ticks if those given are as early as they can be.

    Raises:
      ScheduleError: a token cannot be read, or the schedule is not legal.

    >>> Schedule.from_tokens([["0F0", "0B0"], ["1F0", "1B0"]]).devices
    2
    """
    order = tuple(tuple(_parse(token, d) for token in row) for d, row in enumerate(tokens))
    # Sizes are read off the passes through stages alone: the other kinds count other things.
    passes = [a for row in order for step in row for a in step.parts if a.kind in STAGE_KINDS]
    # An empty list would have no stages and no microbatches to count.
    if not passes:
      raise ScheduleError("a schedule needs at least one action")
    if isinstance(placement, str):
      placement = _place(order, passes, placement)
    if vocabulary is None:
      vocabulary = int(any(a.kind is Kind.S for row in order for step in row for a in step.parts))
    # A gap in the numbers shows up as missing actions.
    schedule = cls(
      name,
      placement,
      1 + max(action.microbatch for action in passes),
      order,
      None if paths is None else tuple(tuple(path) for path in paths),
      vocabulary,
    ).check()
    return schedule if ticks is None else schedule.with_ticks(ticks)


def _parse(token: str, d: int) -> Step:
  """Reads one token of device d's list; errors name the device, for files have many tokens."""
  try:
    return parse_step(token)
  except ScheduleError as error:
    raise ScheduleError(f"device {d}: {error}") from None


def _place(order: Order, passes: Sequence[Action], name: str) -> Placement:
  """Returns the placement of a name for as many stages as the passes mention."""
  if name == "rows":
    return Placement.from_rows(order)
  # Highest number rather than count: a stage that is left out is missing, not absent.
  return Placement.named(name, len(order), 1 + max(action.stage for action in passes))
