"""A schedule is a value: who does what, in which order. Nothing else in the package is state.

It can be built by name (`make_schedule`), read from a file (`interchange`), or written by hand as
lists of tokens, and whatever made it, the checker, the simulator, the drawings and the executor
take it from here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

from jaxpipe.schedules.actions import Action, Kind, Order, ScheduleError
from jaxpipe.schedules.check import check
from jaxpipe.schedules.placement import Placement


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One training step's work, in order.

  Building one directly does not check it; `from_tokens` and `make_schedule` do.

  Attributes:
    name: what to call it.
    placement: which device holds which stage.
    microbatches: number of microbatches, M.
    order: `order[d]` is what device d does, first to last.
  """

  name: str
  placement: Placement
  microbatches: int
  order: Order

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

  def tokens(self) -> list[list[str]]:
    """One list of tokens `<stage><kind><microbatch>` per device."""
    return [[str(action) for action in row] for row in self.order]

  def check(self) -> Self:
    """Returns this schedule if it is a legal training step, else raises ScheduleError."""
    check(self.order, self.placement, self.microbatches)
    return self

  # Under the same name and placement, so that parameters placed for training serve as they are.
  def forward_only(self) -> Self:
    """The same forwards in the same order and nothing else, for evaluation.

    It always runs to the end: forwards wait for forwards only, so leaving the rest out of a legal
    schedule cannot block it.
    """
    order = tuple(tuple(a for a in row if a.kind is Kind.F) for row in self.order)
    return dataclasses.replace(self, order=order)

  @classmethod
  def from_tokens(
    cls,
    tokens: Sequence[Sequence[str]],
    placement: str | Placement = "loop",
    *,
    name: str = "custom",
  ) -> Self:
    """Reads a schedule from text and checks it.

    Args:
      tokens: one list of tokens per device; the numbers of stages and microbatches are read off
        them.
      placement: a placement, the name of one (`loop`, `v`), or `rows` to read it off the lists.
      name: what to call the schedule.

    Returns:
      The schedule.

    Raises:
      ScheduleError: a token cannot be read, or the schedule is not legal.

    >>> Schedule.from_tokens([["0F0", "0B0"], ["1F0", "1B0"]]).devices
    2
    """
    order = tuple(tuple(_parse(token, d) for token in row) for d, row in enumerate(tokens))
    # An empty list would have no stages and no microbatches to count.
    if not any(order):
      raise ScheduleError("a schedule needs at least one action")
    if isinstance(placement, str):
      placement = _place(order, placement)
    # A gap in the numbers shows up as missing actions.
    microbatches = 1 + max(action.microbatch for row in order for action in row)
    return cls(name, placement, microbatches, order).check()


# A token alone does not say where it stands, and files have many.
def _parse(token: str, d: int) -> Action:
  try:
    return Action.parse(token)
  except ScheduleError as error:
    raise ScheduleError(f"device {d}: {error}") from None


def _place(order: Order, name: str) -> Placement:
  if name == "rows":
    return Placement.from_rows(order)
  # Highest number rather than count: a stage that is left out is missing, not absent.
  stages = 1 + max(action.stage for row in order for action in row)
  if stages % len(order):
    raise ScheduleError(
      f"{stages} stages cannot fill {len(order)} devices evenly; give one row of tokens per device"
      " and a multiple of that many stages"
    )
  return Placement.named(name, len(order), stages // len(order))
