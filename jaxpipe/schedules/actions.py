"""Actions, the words of a schedule: one piece of work on one stage for one microbatch.

An action is written as a token `<stage><kind><microbatch>`, such as `3F0` for the forward of stage
3 on microbatch 0. `kinds` lists the kinds, and says what the two numbers count where that is not a
stage and a microbatch. A device may also run a forward and a backward at once, as an overlapped
pair; its token is PyTorch's `(0F7;7B3)OVERLAP_F_B`.
"""

import dataclasses
import re
from typing import Self

from jaxpipe.schedules.kinds import Kind


class ScheduleError(ValueError):
  """A schedule is not legal, or its text cannot be read."""


# Letters other than these (PyTorch's SEND_F, UNSHARD, ...) are refused, not skipped: a schedule
# that was read in part would pass for another one.
_LETTERS = "".join(Kind)
# [0-9] and not \d, which would take the digits of any script.
_TOKEN = re.compile(rf"([0-9]+)([{_LETTERS}])([0-9]+)")
_OVERLAP = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


# Slots: schedules of half a million actions are common in studies of scaling.
@dataclasses.dataclass(frozen=True, slots=True)
class Action:
  """One piece of work of one device, in general a pass of one microbatch through one stage.

  Attributes:
    stage: the number before the letter: a stage, counted from 0, or for some kinds what
      `KindInfo.before` says.
    kind: what is done.
    microbatch: the number after the letter: a microbatch, counted from 0, or for some kinds what
      `KindInfo.after` says.
  """

  stage: int
  kind: Kind
  microbatch: int

  @property
  def parts(self) -> "tuple[Action, ...]":
    """The actions that this step of a device's list consists of, which is itself alone."""
    return (self,)

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


@dataclasses.dataclass(frozen=True, slots=True)
class Overlap:
  """A forward and a backward of different microbatches that a device runs at once (DualPipe).

  Attributes:
    forward: an F.
    backward: a B or an I.
  """

  forward: Action
  backward: Action

  def __post_init__(self) -> None:
    if self.forward.kind is not Kind.F or self.backward.kind not in (Kind.B, Kind.I):
      raise ScheduleError(f"{self} overlaps what is not a forward and a backward (F; B or I)")

  @property
  def parts(self) -> tuple[Action, ...]:
    """The forward, then the backward."""
    return (self.forward, self.backward)

  def __str__(self) -> str:
    return f"({self.forward};{self.backward})OVERLAP_F_B"


# One entry of a device's list.
Step = Action | Overlap
# What every device does, in which order: `order[d]` is device d's list.
Order = tuple[tuple[Step, ...], ...]


def parse_step(token: str) -> Step:
  """Reads one entry of a device's list.

  Args:
    token: `<stage><kind><microbatch>`, or PyTorch's `(<action>;<action>)OVERLAP_F_B`.

  Returns:
    The action or the overlapped pair.

  Raises:
    ScheduleError: the text is neither.

  >>> str(parse_step("(0F7;7B3)OVERLAP_F_B"))
  '(0F7;7B3)OVERLAP_F_B'
  """
  match = _OVERLAP.fullmatch(token.strip())
  if match is None:
    return Action.parse(token)
  return Overlap(Action.parse(match[1]), Action.parse(match[2]))
