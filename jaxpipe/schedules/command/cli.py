"""Runs the command line `python -m jaxpipe.schedules NAME --devices P --microbatches M ...`.

Results go to standard output or a file; errors go to standard error as one line, with exit status
2.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from jaxpipe.schedules import interchange
from jaxpipe.schedules.actions import ScheduleError
from jaxpipe.schedules.build import TICKS, check_memory, make_schedule
from jaxpipe.schedules.checks.sends import check_sends
from jaxpipe.schedules.command import arguments
from jaxpipe.schedules.command.compare import Entry, compare, format_table
from jaxpipe.schedules.drawing import text as draw
from jaxpipe.schedules.drawing.figure import draw_figure
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import EXECUTIONS, Timeline, simulate
from jaxpipe.schedules.transforms.backward import with_backward
from jaxpipe.schedules.transforms.fillers import with_fillers
from jaxpipe.schedules.transforms.recompute import with_recompute
from jaxpipe.schedules.transforms.validation import with_post_validation
from jaxpipe.schedules.transforms.vocabulary import with_vocabulary

_COMPARE = "compare"
# Flags that concern one schedule, with their values where they are not given.
_NOT_FOR_ALL: tuple[tuple[str, object], ...] = (
  ("order", None),
  ("backward", None),
  ("sends", None),
  ("option", []),
  ("execution", EXECUTIONS[0]),
  ("slack", 0),
  ("recompute", False),
  ("ticks", None),
  ("vocabulary", None),
  ("post_validation", False),
  ("fillers", None),
)


def main(words: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    words: the words after the program's name; by default the process's own.

  Returns:
    The exit status: 0, or 2 after an error (argparse's own errors exit at once, with 2).
  """
  parser = arguments.parser()
  flags = parser.parse_args(words)
  try:
    _run(flags)
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


def _run(flags: argparse.Namespace) -> None:
  """Lists, compares, or builds, checks, simulates and writes one schedule."""
  if flags.list:
    print("\n".join(FAMILIES))
    return
  if flags.name == _COMPARE:
    _emit_text(_comparison(flags), flags.out)
    return
  schedule = _transform(_schedule(flags), flags)
  # Again, although building has checked it: a file has not been, and more may be held by now.
  check_memory(schedule, flags.memory, flags.memory_limit)
  if flags.sends is not None:
    check_sends(schedule, flags.sends)
  timeline = simulate(
    schedule, flags.costs, flags.memory, execution=flags.execution, slack=flags.slack
  )
  _emit(timeline, flags.format, flags.out)


def _comparison(flags: argparse.Namespace) -> str:
  """Returns the table of all schedules, as text or JSON; refuses flags that concern one alone."""
  _require_sizes(flags)
  if flags.format not in ("text", "json"):
    raise ValueError(f"a comparison is a table, not a {flags.format}; use --format text or json")
  # Flags that would be ignored silently.
  for word, default in _NOT_FOR_ALL:
    if getattr(flags, word) != default:
      raise ValueError(f"{_COMPARE} takes every schedule in its own way; drop --{word}")
  entries = compare(
    devices=flags.devices,
    microbatches=flags.microbatches,
    chunks=flags.chunks,
    costs=flags.costs,
    memory=flags.memory,
    memory_limit=flags.memory_limit,
  )
  return format_table(entries) if flags.format == "text" else _comparison_json(entries)


def _comparison_json(entries: Sequence[Entry]) -> str:
  """Returns a comparison as a JSON list with one entry per line."""
  rows = [
    {"label": e.label, "reason": e.reason}
    if e.timeline is None
    else {"label": e.label, **interchange.figures(e.timeline)}
    for e in entries
  ]
  return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]"


def _require_sizes(flags: argparse.Namespace) -> None:
  """Raises ValueError unless both sizes that no family has a default for are given."""
  for word in ("devices", "microbatches"):
    if getattr(flags, word) is None:
      raise ValueError(f"{flags.name} needs --{word}")


def _schedule(flags: argparse.Namespace) -> Schedule:
  """Builds or reads the schedule that the flags ask for."""
  # Neither, or both.
  if (flags.name is None) == (flags.order is None):
    raise ValueError("give either the NAME of a schedule or --order FILE; --list prints names")
  if flags.order is not None:
    return _read(flags)
  # An unknown name is the better complaint, and `make_schedule` has it.
  if flags.name in FAMILIES:
    _require_sizes(flags)
  return make_schedule(
    flags.name,
    devices=flags.devices,
    microbatches=flags.microbatches,
    chunks=flags.chunks,
    backward=flags.backward,
    costs=flags.costs,
    memory=flags.memory,
    memory_limit=flags.memory_limit,
    recompute=flags.recompute,
    ticks=flags.ticks or TICKS[0],
    **_options(flags),
  )


def _options(flags: argparse.Namespace) -> dict[str, Any]:
  """Returns the --option flags; raises where one is given twice, or has the name of a flag."""
  options = dict(flags.option)
  if len(options) < len(flags.option):
    raise ValueError("an --option is given twice; give each once")
  taken = next((name for name in options if hasattr(flags, name)), None)
  if taken is not None:
    raise ValueError(f"{taken} is no option of a schedule; use --{taken}")
  return options


def _transform(schedule: Schedule, flags: argparse.Namespace) -> Schedule:
  """Adds the optional actions that flags ask for, and checks the result.

  Vocabulary passes come before optimizer and fillers, with which `with_vocabulary` refuses a
  schedule; fillers come last, into the bubbles that are left.
  """
  added = next((n for n in ("vocabulary", "post_validation", "fillers") if getattr(flags, n)), None)
  if added and flags.ticks == "kind":
    raise ValueError(f"--ticks kind has no place for what --{added} adds; drop one of the two")
  if flags.recompute and flags.order is not None:  # else built with it
    schedule = with_recompute(schedule, flags.costs)
  if flags.vocabulary is not None and not schedule.vocabulary:
    schedule = with_vocabulary(schedule, flags.vocabulary, flags.costs)
  if flags.post_validation:
    schedule = with_post_validation(schedule)
  if flags.fillers is not None:
    schedule = with_fillers(schedule, flags.fillers, flags.costs)
  return schedule.check()


def _read(flags: argparse.Namespace) -> Schedule:
  """Reads --order; sizes follow from the file, so flags that give them must agree."""
  if flags.option:
    raise ValueError(f"{flags.order} is a finished schedule; drop --option")
  if flags.ticks is not None:
    raise ValueError(f"{flags.order} is a finished schedule; drop --ticks")
  path = pathlib.Path(flags.order)
  # Spreadsheets put a byte-order mark in front.
  text = path.read_text(encoding="utf-8-sig")
  try:
    # The placement is read off the rows: the CSV of a V-shaped schedule does not say so.
    if path.suffix == ".json":
      schedule = interchange.from_json(text)
    else:
      # A CSV cannot say how many barriers its S passes have; the flag can.
      schedule = interchange.from_csv(text, name=path.stem, vocabulary=flags.vocabulary)
  except ScheduleError as error:
    raise ScheduleError(f"{path}: {error}") from None
  for word in ("devices", "microbatches", "chunks"):
    asked, found = getattr(flags, word), getattr(schedule, word)
    if asked not in (None, found):
      raise ValueError(f"{path} has {word}={found}, not {asked}; drop --{word}")
  # Unlike a name, a file has no default way: it is taken as it was written.
  if flags.backward is not None:
    schedule = with_backward(schedule, flags.backward, flags.costs)
  return schedule


def _emit(timeline: Timeline, form: str, out: pathlib.Path | None) -> None:
  """Writes a timeline in one of the formats."""
  if form in ("png", "svg"):
    if out is None:
      raise ValueError(f"a picture does not belong in a terminal; give --out FILE.{form}")
    draw_figure(timeline, out, form)
    return
  if form == "json":
    text = interchange.to_json(timeline)
  elif form == "csv":
    text = interchange.to_csv(timeline.schedule)
  elif form == "perfetto":
    text = draw.draw_perfetto(timeline)
  else:
    text = draw.draw_text(timeline, _columns(out))
  _emit_text(text, out)


def _emit_text(text: str, out: pathlib.Path | None) -> None:
  """Writes text to a file or to standard output."""
  # One newline at the end, whichever format it was.
  text = text.rstrip("\n") + "\n"
  if out is None:
    sys.stdout.write(text)
  else:
    out.write_text(text)


def _columns(out: pathlib.Path | None) -> int | None:
  """Returns the columns after which rows are broken, on a terminal; None in a file or a pipe."""
  on_screen = out is None and sys.stdout.isatty()
  return shutil.get_terminal_size().columns if on_screen else None
