"""The command line: `python -m jaxpipe.schedules NAME --devices P --microbatches M ...`.

Results go to standard output or a file; whatever is wrong goes to standard error as one line, with
exit status 2.
"""

import argparse
import math
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxpipe.schedules import draw, interchange
from jaxpipe.schedules.actions import ScheduleError
from jaxpipe.schedules.backward import BACKWARDS, with_backward
from jaxpipe.schedules.costs import Costs, PerStage
from jaxpipe.schedules.figure import draw_png
from jaxpipe.schedules.registry import FAMILIES, check_memory, make_schedule
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline, simulate

# The first is the default.
_FORMATS = ("text", "json", "csv", "png", "perfetto")


class _Parser(argparse.ArgumentParser):
  """Argparse prints its usage above an error; one line is what scripts and people read."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    arguments: the words after the program's name; by default the process's own.

  Returns:
    The exit status: 0, or 2 after an error (argparse's own errors exit at once, with 2).
  """
  parser = _parser()
  flags = parser.parse_args(arguments)
  try:
    if flags.list:
      print("\n".join(FAMILIES))
      return 0
    schedule = _schedule(flags)
    timeline = simulate(schedule, flags.costs, flags.memory)
    _emit(timeline, flags.format, flags.out)
  except ImportError as error:  # NumPy and matplotlib are needed for pictures only
    remedy = "use the Python that has jaxpipe installed, such as .venv/bin/python"
    print(f"{parser.prog}: --format={flags.format}: {error}; {remedy}", file=sys.stderr)
    return 2
  # Whatever else is raised is our mistake and deserves its traceback.
  except (ValueError, OSError) as error:
    # Some messages (a file's bytes quoted back) have line breaks of their own.
    print(f"{parser.prog}: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return 2
  return 0


def _parser() -> argparse.ArgumentParser:
  listed = "\n".join(f"  {name:<10} {family.summary}" for name, family in FAMILIES.items())
  parser = _Parser(
    prog="python -m jaxpipe.schedules",
    description="Build, check, simulate and draw pipeline schedules.",
    epilog=f"schedules:\n{listed}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    # An abbreviated flag would change its meaning with the next flag that is added.
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("name", nargs="?", metavar="NAME", help="the schedule; --list prints the names")
  add("--list", action="store_true", help="print the names and exit")
  add("--order", metavar="FILE.csv", help="in place of NAME: a schedule in PyTorch's CSV")
  add("--devices", type=int, metavar="P")
  add("--microbatches", type=int, metavar="M")
  add("--chunks", type=int, metavar="V", help="stages per device")
  add("--backward", choices=BACKWARDS)
  add(
    "--costs",
    type=_costs,
    default=Costs(),
    metavar="F,I,W,hop",
    help="durations, each a number or one per stage as 1:2:2:1; default 1,1,1,0",
  )
  add(
    "--memory",
    type=_memory,
    default=(1, 0, -1),
    metavar="F,I,W",
    help="changes in what a device holds, in the same way; default 1,0,-1",
  )
  add("--memory_limit", type=_number, metavar="X", help="most that a device may hold")
  add("--format", choices=_FORMATS, default=_FORMATS[0])
  add("--out", type=pathlib.Path, metavar="FILE", help="default: standard output")
  return parser


def _number(text: str) -> float:
  """An int where the text is one: exact integers in, exact integers out."""
  try:
    return int(text)
  except ValueError:
    number = float(text)
  if not math.isfinite(number):
    raise ValueError(f"{text} is not a number")
  return number


def _per_stage(text: str) -> PerStage:
  # Commas separate the kinds already.
  numbers = tuple(_number(part) for part in text.split(":"))
  return numbers if len(numbers) > 1 else numbers[0]


def _costs(text: str) -> Costs:
  try:
    forward, input_grad, weight_grad, hop = text.split(",")
    parts = (_per_stage(forward), _per_stage(input_grad), _per_stage(weight_grad))
    return Costs(*parts, hop=_number(hop))
  except ValueError as error:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not F,I,W,hop such as 1,1,1,0: {error}"
    ) from None


def _memory(text: str) -> tuple[PerStage, PerStage, PerStage]:
  try:
    forward, input_grad, weight_grad = map(_per_stage, text.split(","))
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text!r} is not F,I,W such as 1,0,-1: {error}") from None
  return forward, input_grad, weight_grad


def _schedule(flags: argparse.Namespace) -> Schedule:
  """Builds or reads the schedule that the flags ask for."""
  # Neither, or both.
  if (flags.name is None) == (flags.order is None):
    raise ValueError("give either the NAME of a schedule or --order FILE.csv; --list prints names")
  if flags.order is not None:
    return _read(flags)
  # An unknown name is the better complaint, and `make_schedule` has it.
  if flags.name in FAMILIES:
    for word in ("devices", "microbatches"):
      if getattr(flags, word) is None:
        raise ValueError(f"{flags.name} needs --{word}")
  return make_schedule(
    flags.name,
    devices=flags.devices,
    microbatches=flags.microbatches,
    chunks=flags.chunks,
    backward=flags.backward,
    costs=flags.costs,
    memory=flags.memory,
    memory_limit=flags.memory_limit,
  )


def _read(flags: argparse.Namespace) -> Schedule:
  """Reads --order; sizes follow from the file, so flags that give them must agree."""
  path = pathlib.Path(flags.order)
  try:
    # The placement is read off the rows: the CSV of a V-shaped schedule does not say so.
    schedule = interchange.from_csv(path.read_text(), name=path.stem)
  except ScheduleError as error:
    raise ScheduleError(f"{path}: {error}") from None
  for word in ("devices", "microbatches", "chunks"):
    asked, found = getattr(flags, word), getattr(schedule, word)
    if asked not in (None, found):
      raise ValueError(f"{path} has {word}={found}, not {asked}; drop --{word}")
  # Unlike a name, a file has no default way: it is taken as it was written.
  schedule = with_backward(schedule, flags.backward or "fused")
  check_memory(schedule, flags.memory, flags.memory_limit)
  return schedule


def _emit(timeline: Timeline, form: str, out: pathlib.Path | None) -> None:
  """Writes a timeline in one of the formats."""
  if form == "png":
    if out is None:
      raise ValueError("a PNG does not belong in a terminal; give --out FILE.png")
    draw_png(timeline, out)
    return
  if form == "json":
    text = interchange.to_json(timeline)
  elif form == "csv":
    text = interchange.to_csv(timeline.schedule)
  elif form == "perfetto":
    text = draw.draw_perfetto(timeline)
  else:
    text = draw.draw_text(timeline, _columns(out))
  # One newline at the end, whichever format it was.
  text = text.rstrip("\n") + "\n"
  if out is None:
    sys.stdout.write(text)
  else:
    out.write_text(text)


def _columns(out: pathlib.Path | None) -> int | None:
  """Where rows are to be broken: at a terminal's edge, never in a file or a pipe."""
  on_screen = out is None and sys.stdout.isatty()
  return shutil.get_terminal_size().columns if on_screen else None
