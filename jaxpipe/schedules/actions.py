"""The words of a schedule: an action is one piece of work on one stage for one microbatch.

Kinds are written with PyTorch's letters, so that the CSV files of `torch.distributed.pipelining`
are ours too. Zero Bubble (Qi et al., 2023, arXiv:2401.10241) splits the backward pass: its B is
our `I`, its W our `W`; our `B` is the fused pair.

Not every kind counts stages and microbatches:

  kind        number before it              number after it
  F R I W B   stage                         microbatch
  S T         shard of the vocabulary,      microbatch
              which is the device's number
  G X         stage                         first microbatch of the unit that needs the weights
  Y           frozen layer                  microbatch of the *next* step
  U           stage                         0: step, 1: validate the step before
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
  S = "S"  # output layer on one shard of the vocabulary
  T = "T"  # its weight gradient (with two barriers: all of its gradients)
  G = "G"  # gather a stage's weights
  X = "X"  # release them
  Y = "Y"  # filler: a frozen layer of the next step
  U = "U"  # optimizer

  # Enum's own hash is a Python function, and kinds are looked up several times per action.
  __hash__ = str.__hash__


# What each kind produces. Everything that waits, or that must happen exactly once, is stated in
# terms of these products, so that a fused B needs no special case anywhere else.
PRODUCTS: dict[Kind, tuple[Kind, ...]] = {
  **{kind: (kind,) for kind in Kind},
  Kind.B: (Kind.I, Kind.W),
}

# The passes through a stage: what must be where the stage's weights are.
STAGE_KINDS = frozenset({Kind.F, Kind.R, Kind.I, Kind.W, Kind.B})

# Letters other than these (PyTorch's SEND_F, UNSHARD, ...) are refused, not skipped: a schedule
# that was read in part would pass for another one.
_LETTERS = "".join(Kind)
# [0-9] and not \d, which would take the digits of any script.
_TOKEN = re.compile(rf"([0-9]+)([{_LETTERS}])([0-9]+)")
_OVERLAP = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


# Slots: schedules of half a million actions are common in studies of scaling.
@dataclasses.dataclass(frozen=True, slots=True)
class Action:
  """One piece of work: `kind` for `microbatch` on `stage`, all counted from 0."""

  stage: int
  kind: Kind
  microbatch: int

  @property
  def parts(self) -> "tuple[Action, ...]":
    """The actions that this step of a device's list consists of: itself."""
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
  """A forward and a backward of different microbatches that a device runs at once (DualPipe)."""

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
  """Reads `<stage><kind><microbatch>` or PyTorch's `(<action>;<action>)OVERLAP_F_B`.

  Raises:
    ScheduleError: the text is neither.

  >>> str(parse_step("(0F7;7B3)OVERLAP_F_B"))
  '(0F7;7B3)OVERLAP_F_B'
  """
  match = _OVERLAP.fullmatch(token.strip())
  if match is None:
    return Action.parse(token)
  return Overlap(Action.parse(match[1]), Action.parse(match[2]))
