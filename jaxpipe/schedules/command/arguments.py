"""Declares the flags of the command line, and reads their values.

Readers of values raise `ArgumentTypeError`, which argparse prints after the name of the flag.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import NoReturn

from jaxpipe.schedules.build import TICKS
from jaxpipe.schedules.checks.sends import SENDS
from jaxpipe.schedules.costs import Costs, Memory, PerStage
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.simulate import EXECUTIONS
from jaxpipe.schedules.transforms.backward import BACKWARDS

# The first is the default.
FORMATS = ("text", "json", "csv", "png", "svg", "perfetto")


class _Parser(argparse.ArgumentParser):
  """Argparse prints its usage above an error; one line is what scripts and people read."""

  def error(self, message: str) -> NoReturn:
    """Prints the message in one line and exits with status 2."""
    self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
  """Returns the parser of `python -m jaxpipe.schedules`."""
  width = max(map(len, FAMILIES))
  listed = "\n".join(f"  {name:<{width}}  {family.summary}" for name, family in FAMILIES.items())
  result = _Parser(
    prog="python -m jaxpipe.schedules",
    description="Build, check, simulate, compare and draw pipeline schedules.",
    epilog=f"schedules:\n{listed}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    # An abbreviated flag would change its meaning with the next flag that is added.
    allow_abbrev=False,
  )
  _add_schedule(result)
  _add_model(result)
  _add_output(result)
  return result


def _add_schedule(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say which schedule."""
  add = parser.add_argument_group("the schedule").add_argument
  add(
    "name",
    nargs="?",
    metavar="NAME",
    help="a schedule (--list prints the names), or `compare` for a table of all, best first",
  )
  add("--list", action="store_true", help="print the names and exit")
  add("--order", metavar="FILE", help="in place of NAME: PyTorch's CSV, or our JSON")
  add("--devices", type=int, metavar="P")
  add("--microbatches", type=int, metavar="M")
  add("--chunks", type=int, metavar="V", help="stages per device")
  add("--backward", choices=BACKWARDS)
  add("--ticks", choices=TICKS, help=f"of one program: {TICKS[0]} (default), or by kind")
  add("--recompute", action="store_true", help="add R actions, placed into bubbles")
  add("--vocabulary", type=int, choices=(1, 2), help="add S and T passes with 1 or 2 barriers")
  add("--post_validation", action="store_true", help="add optimizer actions (U)")
  add("--fillers", type=int, metavar="LAYERS", help="add that many frozen layers (Y)")
  add(
    "--option",
    type=_option,
    action="append",
    default=[],
    metavar="NAME=N",
    help="what only one schedule understands, such as waves=2 for hanayo; may be repeated",
  )


def _add_model(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say what it is simulated with."""
  add = parser.add_argument_group("costs, memory and execution").add_argument
  add(
    "--costs",
    type=_costs,
    default=Costs(),
    metavar="F,I,W,hop[,NAME=X]",
    help="durations, each a number or one per stage as 1:2:2:1; default 1,1,1,0; further ones by"
    f" name: {', '.join(_EXTRA_COSTS)}",
  )
  add(
    "--memory",
    type=_memory,
    default=(1, 0, -1),
    metavar="F,I,W[,R]",
    help="changes in what a device holds, in the same way; default 1,0,-1",
  )
  add(
    "--memory_limit",
    type=_limit,
    metavar="X",
    help="most that a device may hold; a number, or one per device as 4:4:3:2",
  )
  add("--execution", choices=EXECUTIONS, default=EXECUTIONS[0], help="see `simulate`")
  add("--slack", type=int, default=0, metavar="TICKS", help="for --execution coupled")
  add("--sends", choices=SENDS, help="check that messages that keep their order do not dead-lock")


def _add_output(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say what is written, and where."""
  add = parser.add_argument_group("output").add_argument
  add("--format", choices=FORMATS, default=FORMATS[0])
  add("--out", type=pathlib.Path, metavar="FILE", help="default: standard output")


def _number(text: str) -> float:
  """Reads a finite number, as an int where the text is one: integers in, integers out."""
  try:
    return int(text)
  except ValueError:
    number = float(text)
  if not math.isfinite(number):
    raise ValueError(f"{text} is not a number")
  return number


def _per_stage(text: str) -> PerStage:
  """Reads one number, or one per stage with colons between."""
  # Commas separate the kinds already.
  numbers = tuple(_number(part) for part in text.split(":"))
  return numbers if len(numbers) > 1 else numbers[0]


def _limit(text: str) -> PerStage:
  """Reads --memory_limit."""
  try:
    return _per_stage(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text!r} is not X such as 4 or 4:3:2: {error}") from None


def _switch(text: str) -> bool:
  """Reads 0 or 1."""
  if text not in ("0", "1"):
    raise ValueError(f"{text} is neither 0 nor 1")
  return text == "1"


# Costs that few people need, by the names of `Costs`, and how their values are read.
_EXTRA_COSTS: Mapping[str, Callable[[str], PerStage | bool]] = {
  field.name: {"hop_occupies_link": _switch, "head": _number, "overlap": _number}.get(
    field.name, _per_stage
  )
  for field in dataclasses.fields(Costs)
  if field.kw_only
}


def _costs(text: str) -> Costs:
  """Reads --costs: the four of every schedule by position, further ones as NAME=X."""
  try:
    values = [part for part in text.split(",") if "=" not in part]
    pairs = [part.split("=", 1) for part in text.split(",") if "=" in part]
    named = dict(pairs)
    if len(named) < len(pairs):
      raise ValueError("a name stands twice")
    forward, input_grad, weight_grad, hop = values
    base = Costs(_per_stage(forward), _per_stage(input_grad), _per_stage(weight_grad), _number(hop))
    unknown = next((name for name in named if name not in _EXTRA_COSTS), None)
    if unknown is not None:
      raise ValueError(f"{unknown} is none of {', '.join(_EXTRA_COSTS)}")
    # mypy cannot follow names that come from a table.
    extra: dict[str, object] = {name: _EXTRA_COSTS[name](value) for name, value in named.items()}
    return dataclasses.replace(base, **extra)  # type: ignore[arg-type]
  except ValueError as error:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not F,I,W,hop such as 1,1,1,0: {error}"
    ) from None


def _memory(text: str) -> Memory:
  """Reads --memory."""
  try:
    changes = tuple(map(_per_stage, text.split(",")))
    if len(changes) not in (3, 4):
      raise ValueError(f"it has {len(changes)} parts, not 3 or 4")
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text!r} is not F,I,W such as 1,0,-1: {error}") from None
  return changes


def _option(text: str) -> tuple[str, int]:
  """Reads one --option NAME=N."""
  name, _, value = text.partition("=")
  try:
    return name, int(value)
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N such as waves=2") from None
