"""Finds which action of the schedule an instruction belongs to, and how often it runs.

The executor traces each action inside a name scope, mostly in a branch of a conditional, and XLA
keeps the path of scopes beside every instruction:

    op_name="jit(step)/jit(run)/shard_map/while/body/F/cond/branch_1_fun/while/body/dot_general"
                                                     ^ the action; further in, its loop over layers

An instruction of an action runs as often as the loops inside the action say, each time that a
device does the action; the schedule says how often that is. Any other instruction runs on every
device, as often as the loops round it say.

Where ticks are unrolled, the code of one action stands at several sites, and a device passes
another one each time. The text does not say which, so that one site counts for all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from jaxpipe.pipeline.compiled.cycles import branches, trip_count
from jaxpipe.pipeline.compiled.hlo import Computation, HloModule, Instruction
from jaxpipe.pipeline.compiled.walk import Frame, walk
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.program import CODE
from jaxpipe.schedules import Action, Kind, Schedule

# The name scopes of `Now.when` and `Now.at_end`.
FIRST, LAST = "first_stage", "last_stage"
# In the order in which reports list them: what every step has, what some have, the ends.
_KINDS = sorted(CODE, key=lambda kind: not kind.info.necessary)
SCOPES = (*(kind.value for kind in _KINDS), FIRST, LAST)
# The name scope of `Now.collective`: a column of the tick table, such as `embedding_0`.
_STAGE_COLLECTIVE = re.compile(r"(?:embedding|output|barrier|embedding_gradient)_\d+")


@dataclasses.dataclass(frozen=True)
class ActionSite:
  """The action that an instruction belongs to, and how often the instruction runs in it.

  Attributes:
    path: name scopes of the action, the outermost first: `("F",)`, `("F", "first_stage")`; empty
      for an instruction that belongs to no action.
    times: executions of the instruction each time that the action is done; without an action,
      executions in one step.
    unknown: number of loops of unknown length that are counted in `times` as one iteration.
    computation: name of the computation in which the action begins, which tells apart the sites of
      an action that the program contains several times.
  """

  path: tuple[str, ...]
  times: int
  unknown: int
  computation: str


@dataclasses.dataclass(frozen=True)
class Located:
  """An instruction that runs, with its surroundings.

  Attributes:
    instruction: the instruction.
    computation: the computation that it stands in.
    frames: the calls that lead there from the entry computation, outermost first.
    site: the action that it belongs to.
  """

  instruction: Instruction
  computation: Computation
  frames: Sequence[Frame]
  site: ActionSite


def locate(module: HloModule, wanted: Callable[[str], bool]) -> Iterator[Located]:
  """Yields the instructions of some opcodes, each once for every path of calls that leads to it.

  Args:
    module: the program.
    wanted: whether instructions of an opcode are to be yielded.
  """
  sites = _Sites(module)
  for instruction, computation, frames in walk(module):
    if wanted(instruction.opcode):
      site = sites.of(instruction, computation, frames)
      yield Located(instruction, computation, frames, site)


class _Sites:
  """Finds the action sites of one program; the branches of its conditionals are read once."""

  def __init__(self, module: HloModule):
    self._module = module
    self._scopes = {(b.conditional, b.index): b.scope for b in branches(module, SCOPES)}

  def of(
    self, instruction: Instruction, computation: Computation, frames: Sequence[Frame]
  ) -> ActionSite:
    """Returns the site of an instruction that `walk` yields.

    [1] The path is that of the innermost call that bears a scope. A call inside `first_stage` has
        both scopes in its name, the conditional of the action round it only the first.
    [2] The instruction's own name counts only where no call bears a scope.
    [3] Where no name helps, the path is the scope that most of the outermost conditional's branch
        comes from.
    [4] The action begins at its outermost call that bears a scope, or at the outermost conditional.
        Only the loops from there on multiply `times`; those outside are loops over ticks, which the
        schedule counts. Without an action, all loops multiply.
    """
    named = [_path(frame.instruction.op_name) for frame in frames]
    opcodes = [frame.instruction.opcode for frame in frames]
    conditional = opcodes.index("conditional") if "conditional" in opcodes else None
    paths = (
      *reversed(named),  # [1]
      _path(instruction.op_name),  # [2]
      self._path_of_branch(frames[conditional]) if conditional is not None else (),  # [3]
    )
    path = next(filter(None, paths), ())
    begins = (i for i in range(len(frames)) if named[i] or i == conditional)
    begin = next(begins, len(frames)) if path else 0  # [4]
    trips = [
      trip_count(self._module, frame.instruction)
      for frame in frames[begin:]
      if frame.instruction.opcode == "while"
    ]
    times = math.prod(1 if trip is None else trip for trip in trips)
    begins_in = frames[begin].caller if begin < len(frames) else computation.name
    return ActionSite(path, times, trips.count(None), begins_in)

  def _path_of_branch(self, frame: Frame) -> tuple[str, ...]:
    """The scope that most of a conditional's branch comes from, as a path; empty for none."""
    conditional = frame.instruction
    scope = self._scopes.get((conditional.name, conditional.runs.index(frame.callee)))
    return (scope,) if scope else ()


def _path(op_name: str) -> tuple[str, ...]:
  """The executor's name scopes in an `op_name`: an action's, and at most one of an end in it."""
  parts = op_name.split("/")
  found = (i for i, part in enumerate(parts) if part in SCOPES or _STAGE_COLLECTIVE.fullmatch(part))
  first = next(found, None)
  if first is None:
    return ()
  # Further in, a layer may have scopes of its own that are called F or T: only ends count there.
  ends = [part for part in parts[first + 1 :] if part in (FIRST, LAST)]
  return (parts[first], *ends[:1])


class HasSite(Protocol):
  """Anything that was found at an action site, such as a collective or a matrix product."""

  @property
  def site(self) -> ActionSite:
    """The site."""
    ...


Item = TypeVar("Item", bound=HasSite)


def once_each(items: Iterable[Item], size: Callable[[Item], float]) -> list[Item]:
  """Keeps of each action the items of one site alone, so that unrolled ticks count once.

  Args:
    items: of the whole program.
    size: of one execution of an item. The site whose items have the largest sum, each times its
      executions, is kept.

  Returns:
    Those items, by action. Items that belong to no action are all kept.
  """

  def total(found: list[Item]) -> float:
    return sum(size(item) * item.site.times for item in found)

  sites: dict[tuple[str, ...], dict[str, list[Item]]] = collections.defaultdict(dict)
  for item in items:
    computation = item.site.computation if item.site.path else ""
    sites[item.site.path].setdefault(computation, []).append(item)
  return [item for by_site in sites.values() for item in max(by_site.values(), key=total)]


def runs(schedule: Schedule, path: Sequence[str]) -> tuple[int, ...]:
  """Counts how often each device does an action in one step.

  Args:
    schedule: of the step.
    path: as of `ActionSite`; the empty path stands for the step itself.

  Returns:
    A count for each device along `stage`.
  """
  if not path:
    return (1,) * schedule.devices
  if _STAGE_COLLECTIVE.fullmatch(path[0]):
    # All devices take part in a collective over the stages, whatever action the tick has for them.
    column = lower(schedule).collectives.microbatches.get(path[0])
    return (int((column >= 0).sum()) if column is not None else 0,) * schedule.devices
  # At two places the scope of an end is in no action's: the embedding's gradient is traced after B
  # or I of the first stage, and the loss after F of the last.
  alone = {FIRST: (Kind.B, Kind.I), LAST: (Kind.F,)}
  kinds = alone.get(path[0]) or (Kind(path[0]),)

  def does(action: Action) -> bool:
    stages = schedule.path(action.microbatch)
    at_ends = (FIRST not in path or action.stage == stages[0]) and (
      LAST not in path or action.stage == stages[-1]
    )
    return action.kind in kinds and at_ends

  return tuple(sum(does(a) for step in row for a in step.parts) for row in schedule.order)
