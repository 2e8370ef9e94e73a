"""Which action an instruction of a compiled step belongs to, and how often it runs.

The executor runs each action inside a name scope, mostly in a branch of a conditional. What stands
in there runs as often as the loops inside say, each time that a device does the action; how often
that is, the schedule says. All else runs on every device, as often as the loops round it say.

Where ticks are written out, one action stands in several places (sites), of which a device comes by
another one each time: the text does not say which, and one of them speaks for all.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from jaxpipe.pipeline.compiled.cycles import branches, trip_count
from jaxpipe.pipeline.compiled.hlo import Computation, Entered, Instruction, Module, walk
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.schedules import Action, Kind, Schedule

# The name scopes of `Now.when` and `Now.at_end`.
FIRST, LAST = "first_stage", "last_stage"
SCOPES = ("F", "B", "I", "W", "R", "S", "T", "G", FIRST, LAST)
# And that of `Now.meet`: a column of the tick table.
_MEETING = re.compile(r"(?:embedding|output|barrier|embedding_gradient)_\d+")


@dataclasses.dataclass(frozen=True)
class ActionSite:
  """Where an instruction stands.

  Attributes:
    path: scopes that it belongs to, the outermost first: `("F",)`, `("F", "first_stage")`; empty
      for what belongs to no action.
    times: how often it runs each time that the action is done, or, outside of all, in one step.
    unknown: loops of unknown length, which count as one turn in `times`.
    site: name of the computation in which the action begins.
  """

  path: tuple[str, ...]
  times: int
  unknown: int
  site: str


class Placed(Protocol):
  """What has a place."""

  @property
  def place(self) -> ActionSite: ...


class Places:
  """Finds the places of a program's instructions.

  Attributes:
    module: the program.
  """

  def __init__(self, module: Module):
    self.module = module
    self._scopes = {(b.conditional, b.index): b.scope for b in branches(module, SCOPES)}

  def of(self, one: Instruction, where: Computation, way: Sequence[Entered]) -> ActionSite:
    """The place of what `walk` yields."""
    named = [_path(entered.instruction.op_name) for entered in way]
    branch = next((i for i, e in enumerate(way) if e.instruction.opcode == "conditional"), None)
    path = next(filter(None, [*reversed(named), _path(one.op_name), self._voted(way, branch)]), ())
    begins = (i for i in range(len(way)) if named[i] or i == branch)
    begin = next(begins, len(way)) if path else 0
    trips = [
      trip_count(self.module, entered.instruction)
      for entered in way[begin:]
      if entered.instruction.opcode == "while"
    ]
    times = math.prod(1 if trip is None else trip for trip in trips)
    site = way[begin].where if begin < len(way) else where.name
    return ActionSite(path, times, trips.count(None), site)

  def _voted(self, way: Sequence[Entered], branch: int | None) -> tuple[str, ...]:
    """The scope of most of a branch, where nothing on the way bears one."""
    if branch is None:
      return ()
    one, into = way[branch].instruction, way[branch].into
    scope = self._scopes.get((one.name, one.runs.index(into)))
    return (scope,) if scope else ()


def _path(op_name: str) -> tuple[str, ...]:
  """The executor's scopes in a name; a layer may have scopes of its own further in."""
  parts = op_name.split("/")
  first = next((i for i, p in enumerate(parts) if p in SCOPES or _MEETING.fullmatch(p)), None)
  if first is None:
    return ()
  ends = [part for part in parts[first + 1 :] if part in (FIRST, LAST)]
  return (parts[first], *ends[:1])


Item = TypeVar("Item", bound=Placed)


def once_each(items: Iterable[Item], size: Callable[[Item], float]) -> list[Item]:
  """Of each action, the items of one site alone: of that which has most by `size`.

  What belongs to no action is all kept.
  """
  sites: dict[tuple[str, ...], dict[str, list[Item]]] = collections.defaultdict(dict)
  for item in items:
    site = item.place.site if item.place.path else ""
    sites[item.place.path].setdefault(site, []).append(item)
  return [item for by_site in sites.values() for item in max(by_site.values(), key=_sum(size))]


def _sum(size: Callable[[Item], float]) -> Callable[[list[Item]], float]:
  return lambda items: sum(size(item) * item.place.times for item in items)


def runs(schedule: Schedule, path: Sequence[str]) -> tuple[int, ...]:
  """How often each device along `stage` does in one step what stands under a path of scopes."""
  if not path:
    return (1,) * schedule.devices
  if _MEETING.fullmatch(path[0]):
    column = lower(schedule).meetings.microbatches.get(path[0])
    return (int((column >= 0).sum()) if column is not None else 0,) * schedule.devices
  # The embedding's gradient follows B or I, the loss follows F.
  alone = {FIRST: (Kind.B, Kind.I), LAST: (Kind.F,)}
  kinds = alone.get(path[0]) or (Kind(path[0]),)

  def does(action: Action) -> bool:
    stages = schedule.path(action.microbatch)
    at_ends = (FIRST not in path or action.stage == stages[0]) and (
      LAST not in path or action.stage == stages[-1]
    )
    return action.kind in kinds and at_ends

  return tuple(sum(does(a) for step in row for a in step.parts) for row in schedule.order)


def every(
  module: Module, opcodes: Callable[[str], bool]
) -> Iterable[tuple[Instruction, Computation, Sequence[Entered], ActionSite]]:
  """Yields the instructions of some opcodes, where they stand, the way there, and their places."""
  places = Places(module)
  for one, where, way in walk(module):
    if opcodes(one.opcode):
      yield one, where, way, places.of(one, where, way)
