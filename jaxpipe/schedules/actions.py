"""The words of a schedule: an action is one piece of work on one stage for one microbatch.

Kinds are written with PyTorch's letters, so that the CSV files of `torch.distributed.pipelining`
are ours too. Zero Bubble (Qi et al., 2023, arXiv:2401.10241) splits the backward pass: its B is
our `I`, its W our `W`; our `B` is the fused pair.

Later kinds (vocabulary passes, weight gathering, fillers, updates) are further members of `Kind`;
overlapped pairs such as `(0F7;7B3)OVERLAP_F_B` would be a second action type beside `Action`.
"""

import dataclasses
import enum
import re
from typing import Self


class ScheduleError(ValueError):
  """A schedule is not legal, or its text cannot be read."""


class Kind(enum.StrEnum):
  """What a device does in one action."""

  F = "F"  # forward
  R = "R"  # recompute what a rematerialized forward dropped
  I = "I"  # gradient of the stage's input
  W = "W"  # gradient of the stage's weights
  B = "B"  # I and W in one


# What each kind produces. Everything that waits, or that must happen exactly once, is stated in
# terms of these products, so that a fused B needs no special case anywhere else.
PRODUCTS: dict[Kind, tuple[Kind, ...]] = {
  Kind.F: (Kind.F,),
  Kind.R: (Kind.R,),
  Kind.I: (Kind.I,),
  Kind.W: (Kind.W,),
  Kind.B: (Kind.I, Kind.W),
}

# Letters other than these (PyTorch's SEND_F, UNSHARD, ...) are refused, not skipped: a schedule
# that was read in part would pass for another one.
_LETTERS = "".join(Kind)
# [0-9] and not \d, which would take the digits of any script.
_TOKEN = re.compile(rf"([0-9]+)([{_LETTERS}])([0-9]+)")


# Slots: schedules of half a million actions are common in studies of scaling.
@dataclasses.dataclass(frozen=True, slots=True)
class Action:
  """One piece of work: `kind` for `microbatch` on `stage`, all counted from 0."""

  stage: int
  kind: Kind
  microbatch: int

  @classmethod
  def parse(cls, token: str) -> Self:
    """Reads a token `<stage><kind><microbatch>`.

    Args:
      token: such as `3F0`; blanks around it are dropped.

    Returns:
      The action.

    Raises:
      ScheduleError: the text is not a token.

    >>> Action.parse("3F0")
    Action(stage=3, kind=<Kind.F: 'F'>, microbatch=0)
    """
    match = _TOKEN.fullmatch(token.strip())
    if match is None:
      raise ScheduleError(
        f"{token!r} is not an action; write <stage><kind><microbatch> such as 3F0,"
        f" with a kind out of {' '.join(Kind)}"
      )
    stage, kind, microbatch = match.groups()
    return cls(int(stage), Kind(kind), int(microbatch))

  def __str__(self) -> str:
    # The value, because formatting an enum member is several times slower.
    return f"{self.stage}{self.kind.value}{self.microbatch}"


# What every device does, in which order: `order[d]` is device d's list.
Order = tuple[tuple[Action, ...], ...]
