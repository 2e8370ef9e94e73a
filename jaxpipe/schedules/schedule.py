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
from jaxpipe.schedules.ticks import ticks as early_ticks


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
    wait for forwards only, so leaving the rest out of a legal schedule cannot block it.
    """
    return self.of_kinds({Kind.F, Kind.S})

  def of_kinds(self, kinds: Container[Kind]) -> Self:
    """Returns the schedule of the actions of some kinds alone, with pairs as two actions.

    Ticks that it has stay in their order, and two actions of a pair have one each.
    """
    most = max((len(step.parts) for row in self.order for step in row), default=1)
    order, ticks = [], []
    for d, row in enumerate(self.order):
      kept = [
        (action, most * self.ticks[d][i] + n if self.ticks else 0)
        for i, step in enumerate(row)
        for n, action in enumerate(step.parts)
        if action.kind in kinds
      ]
      order.append(tuple(action for action, _ in kept))
      ticks.append(tuple(tick for _, tick in kept))
    own = tuple(ticks) if self.ticks else None
    return dataclasses.replace(self, order=tuple(order), ticks=own)

  def with_order(self, order: Order) -> Self:
    """Returns the schedule with other lists.

    Raises:
      ScheduleError: it has ticks, which belong to its own lists.
    """
    if self.ticks is not None:
      raise ScheduleError(
        f"schedule {self.name} has ticks of its own, which other lists would not fit; leave out"
        " what changes them, or the ticks"
      )
    return dataclasses.replace(self, order=order)

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
    if ticks is None:
      return schedule
    own = dataclasses.replace(schedule, ticks=tuple(map(tuple, ticks))).check()
    return schedule if own.ticks == early_ticks(schedule) else own


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
