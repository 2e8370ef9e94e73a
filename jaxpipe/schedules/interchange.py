"""Reads and writes schedules as files: our JSON, and the CSV of `torch.distributed.pipelining`.

In the CSV every device is one row of tokens. PyTorch writes an empty cell where a device idles;
idling follows from the order, so empty cells are read and dropped, and never written.
"""

import csv
import io
import json

from jaxpipe.schedules.actions import ScheduleError
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline
from jaxpipe.schedules.ticks import ticks


def to_json(timeline: Timeline) -> str:
  """Writes a schedule with its times and peaks.

  Args:
    timeline: the simulated schedule.

  Returns:
    A JSON object with one field per line: the schedule's `name, devices, microbatches, chunks` and
    `order` (one list of tokens per device), then `ticks` (one list of the ticks of these tokens in
    one program), and the timeline's figures.
  """
  schedule = timeline.schedule
  # These names are read by programs outside this package.
  fields: dict[str, object] = {
    "name": schedule.name,
    "devices": schedule.devices,
    "microbatches": schedule.microbatches,
    "chunks": schedule.chunks,
    "order": schedule.tokens(),
    "ticks": ticks(schedule),
    **figures(timeline),
  }
  if schedule.placement.replicated:
    # With few microbatches the rows do not show every replica.
    fields["placement"] = schedule.placement.table
  if schedule.paths is not None:
    fields["paths"] = schedule.paths
  if schedule.vocabulary:
    fields["vocabulary"] = schedule.vocabulary
  # A field per line: orders stay one row each to the eye, and files differ line by line.
  lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
  return "{\n" + ",\n".join(lines) + "\n}"


def _check_fields(fields: dict[str, object]) -> None:
  """Raises ScheduleError where a field is not of the shape that it must have."""
  shapes = {
    "order": ("a list of lists of tokens", lambda x: _is_rows(x, str)),
    "paths": ("a list of lists of stages", lambda x: x is None or _is_rows(x, int)),
    "placement": ("a list of lists of stages", lambda x: _is_rows(x, int)),
    "name": ("a text", lambda x: isinstance(x, str) and x.isprintable()),
    "ticks": ("a list of lists of whole numbers", lambda x: x is None or _is_rows(x, int)),
    "vocabulary": ("0, 1 or 2", lambda x: type(x) is int and 0 <= x <= 2),
  }
  for name, (shape, fits) in shapes.items():
    if name in fields and not fits(fields[name]):
      raise ScheduleError(f'the field "{name}" of the JSON is not {shape}')


def _is_rows(value: object, kind: type) -> bool:
  """Returns whether a value is a list of lists of exactly this type, `bool` being no `int`."""
  return isinstance(value, list) and all(
    isinstance(row, list) and all(type(item) is kind for item in row) for row in value
  )


def figures(timeline: Timeline) -> dict[str, object]:
  """Returns the figures of a timeline by the names of the JSON's fields."""
  return {
    "makespan": timeline.makespan,
    "span": timeline.span,
    "bubble": timeline.bubble,
    "span_bubble": timeline.span_bubble,
    "peak_activations": timeline.peak_activations,
    "peak_pending_weight_grads": timeline.peak_pending_weight_grads,
    "peak_memory": timeline.peak_memory,
  }


def from_json(text: str, placement: str | Placement | None = None) -> Schedule:
  """Reads a schedule back from JSON.

  Args:
    text: what `to_json` wrote, or any object with `order`; its `name`, `placement` (the stages of
      each device), `paths`, `vocabulary` and `ticks` are read too.
    placement: as in `Schedule.from_tokens`; by default that of the text, or read off the rows.

  Returns:
    The schedule.

  Raises:
    ScheduleError: the text holds no order, or the schedule is not legal.
  """
  try:
    fields = json.loads(text)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ScheduleError(f"not JSON: {error}") from None
  if not isinstance(fields, dict) or "order" not in fields:
    raise ScheduleError('the JSON has no field "order", one list of tokens per device')
  _check_fields(fields)
  if placement is None:
    table = fields.get("placement")
    placement = "rows" if table is None else Placement.of_table(table)
  # Sizes and figures are not compared: somebody who edits an order by hand leaves them behind.
  # Ticks that no longer fit it are refused, for a program would follow them.
  return Schedule.from_tokens(
    fields["order"],
    placement,
    name=fields.get("name", "custom"),
    paths=fields.get("paths"),
    vocabulary=fields.get("vocabulary"),
    ticks=fields.get("ticks"),
  )


def to_csv(schedule: Schedule) -> str:
  """Writes a schedule as PyTorch's CSV: one row of comma-separated tokens per device.

  Raises:
    ScheduleError: microbatches skip or reorder stages, or the schedule has ticks of its own, for
      which the CSV has no words.
  """
  if schedule.ticks is not None:
    raise ScheduleError(
      f"{schedule.name} has ticks of its own, which a CSV cannot hold; write JSON"
    )
  if schedule.paths is not None:
    raise ScheduleError(f"{schedule.name} has paths, which a CSV cannot hold; write JSON")
  text = io.StringIO()
  # The csv module would end lines as on DOS.
  csv.writer(text, lineterminator="\n").writerows(schedule.tokens())
  return text.getvalue()


def from_csv(
  text: str,
  placement: str | Placement = "rows",
  *,
  name: str = "custom",
  vocabulary: int | None = None,
) -> Schedule:
  """Reads a schedule from PyTorch's CSV.

  Args:
    text: one row of comma-separated tokens per device; empty cells and empty last rows are skipped.
    placement: as in `Schedule.from_tokens`; read off the rows by default, for the CSV names none.
    name: what to call the schedule.
    vocabulary: as in `Schedule.from_tokens`.

  Returns:
    The schedule.

  Raises:
    ScheduleError: a cell is no token, or the schedule is not legal.
  """
  try:
    rows = [[cell for cell in row if cell.strip()] for row in csv.reader(text.splitlines())]
  except csv.Error as error:
    raise ScheduleError(f"not a CSV file of tokens: {error}") from None
  # An empty row in the middle stays: it is a device without work, which is an error to report.
  while rows and not rows[-1]:
    rows.pop()
  return Schedule.from_tokens(rows, placement, name=name, vocabulary=vocabulary)
