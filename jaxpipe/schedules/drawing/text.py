"""Draws timetables as text for a terminal, and as a trace for Perfetto (https://ui.perfetto.dev).

The text is to scale: an action's place and width are its start and its duration.
"""

import json
from collections.abc import Iterator, Mapping

from jaxpipe.schedules.actions import Action, Step
from jaxpipe.schedules.kinds import STAGE_KINDS, Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline

# Beyond this many columns nobody reads on; very unequal costs would ask for millions.
_MOST_COLUMNS = 20_000


def draw_text(timeline: Timeline, width: int | None = None) -> str:
  """Draws a timetable with one row per device.

  Cells hold the kind and the microbatch, after the stage where devices hold more than one; dashes
  fill the rest of an action's time.

  Args:
    timeline: what to draw.
    width: columns of the terminal; a longer timetable continues below. None never breaks rows.

  Returns:
    Lines of text: a title, the rows with each device's peak of activations, and the legend.

  >>> from jaxpipe.schedules import make_schedule, simulate
  >>> print(draw_text(simulate(make_schedule("gpipe", devices=2, microbatches=2))))
  gpipe: 2 devices, 2 microbatches, 1 chunk each
  device 0 | F0 F1          B0--- B1--- | peak 2
  device 1 |    F0 F1 B0--- B1---       | peak 2
  makespan 9  bubble 33.3 %  span 9  span bubble 33.3 %
  """
  scale = _scale(timeline)
  columns = round(timeline.makespan * scale)
  rows = [_row(timeline, d, scale).ljust(columns) for d in range(timeline.schedule.devices)]
  heads = [f"device {d}" for d in range(len(rows))]
  heads = [head.ljust(max(map(len, heads))) + " | " for head in heads]
  tails = [f"| {peak}" for peak in _peaks(timeline)]
  # At least 20, or a narrow terminal would get one column per block.
  wide = columns if width is None else max(20, width - len(heads[0]) - max(map(len, tails)))
  blocks = [
    [
      # Peaks stand at the end of the last block only, where a device's row ends.
      (head + row[left : left + wide] + (tail if left + wide >= columns else "")).rstrip()
      for head, row, tail in zip(heads, rows, tails, strict=True)
    ]
    for left in range(0, max(columns, 1), max(wide, 1))
  ]
  body = "\n\n".join("\n".join(block) for block in blocks)
  return f"{title(timeline)}\n{body}\n{summary(timeline)}"


# The figure has the same words, so that text and picture of one schedule can be told to agree.
def title(timeline: Timeline) -> str:
  """Returns the schedule's name and sizes in one line."""
  schedule = timeline.schedule
  counts = (
    (schedule.devices, "device"),
    (schedule.microbatches, "microbatch"),
    (schedule.chunks, "chunk"),
  )
  words = [f"{n} {word}{'' if n == 1 else 'es' if word[-1] == 'h' else 's'}" for n, word in counts]
  return f"{schedule.name}: {', '.join(words)} each"


def summary(timeline: Timeline) -> str:
  """Returns makespan and span, with the share of each that is idle, in one line."""
  return (
    f"makespan {timeline.makespan:.10g}  bubble {timeline.bubble:.1%}"
    f"  span {timeline.span:.10g}  span bubble {timeline.span_bubble:.1%}"
  ).replace("%", " %")


def draw_perfetto(timeline: Timeline) -> str:
  """Writes a timeline as a trace: one track per device, one slice per action.

  Args:
    timeline: what to draw; a unit of its time becomes a millisecond.

  Returns:
    JSON in the Trace Event Format, which https://ui.perfetto.dev opens.
  """
  return draw_traces({timeline.schedule.name: timeline})


def draw_traces(timelines: Mapping[str, Timeline]) -> str:
  """Writes several timelines as one trace, each as a process of its own with tracks for devices.

  Args:
    timelines: name of the process -> timeline; a unit of its time becomes a millisecond.

  Returns:
    JSON in the Trace Event Format, which https://ui.perfetto.dev opens.
  """
  events = [
    event
    for process, (name, timeline) in enumerate(timelines.items())
    for event in _events(timeline, process, name)
  ]
  return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _events(timeline: Timeline, process: int, name: str) -> Iterator[dict[str, object]]:
  """Yields the trace events of one timeline: names of process and tracks, then the slices."""
  schedule = timeline.schedule
  yield {"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}
  for d in range(schedule.devices):
    # Tracks are sorted by their ids, so device 0 comes out on top.
    track = {"pid": process, "tid": d}
    yield {"name": "thread_name", "ph": "M", **track, "args": {"name": f"device {d}"}}
    for step, start, end in cells(timeline, d):
      # The format counts microseconds.
      time = {"ts": start * 1000, "dur": (end - start) * 1000}
      # The parts of a pair take the same time and are shown one below the other.
      yield from ({**_slice(action, d, schedule), **track, **time} for action in step.parts)


def _slice(action: Action, d: int, schedule: Schedule) -> dict[str, object]:
  """Returns the trace event of an action, without its track and times."""
  args = {"stage": action.stage, "microbatch": action.microbatch}
  if action.kind in STAGE_KINDS:
    args["chunk"] = schedule.placement.chunk(d, action.stage)
  return {"name": str(action), "cat": action.kind.value, "ph": "X", "args": args}


def cells(timeline: Timeline, device: int) -> Iterator[tuple[Step, float, float]]:
  """Yields the steps of one device, each with its start and end."""
  return zip(
    timeline.schedule.order[device], timeline.start[device], timeline.end[device], strict=True
  )


def _row(timeline: Timeline, d: int, scale: float) -> str:
  """Returns a device's timetable as text, at so many columns per unit of time."""
  row = ""
  for action, start, end in cells(timeline, d):
    # Rounding both ends, never the width, keeps a long row from drifting off the time axis.
    left, right = round(start * scale), round(end * scale)
    # The last column of a cell stays blank, to keep neighbours apart.
    label = _label(timeline, action)[: max(right - left - 1, 0)]
    row = row.ljust(left) + label.ljust(right - left - 1, "-")
  return row


def _label(timeline: Timeline, step: Step) -> str:
  """Returns the text of a cell, without the stage's number where each device has one stage."""
  # Frozen layers are numbered on their own.
  return "/".join(
    str(a) if timeline.schedule.chunks > 1 or a.kind is Kind.Y else f"{a.kind.value}{a.microbatch}"
    for a in step.parts
  )


def _scale(timeline: Timeline) -> float:
  """Returns the columns per unit of time at which every action holds its label and a blank."""
  boxes = [
    (len(_label(timeline, action)) + 1, start, end)
    for d in range(timeline.schedule.devices)
    for action, start, end in cells(timeline, d)
    # What takes no time has no width to put a label in.
    if end > start
  ]
  scale = max((columns / (end - start) for columns, start, end in boxes), default=1.0)
  # Where times do not fall on whole columns, rounding takes up to one column from a box.
  if any(round(end * scale) - round(start * scale) < columns for columns, start, end in boxes):
    scale = max((columns + 1) / (end - start) for columns, start, end in boxes)
  return min(scale, _MOST_COLUMNS / timeline.makespan) if timeline.makespan else 1.0


def _peaks(timeline: Timeline) -> list[str]:
  """Returns the text beside each row: the peak in chunks, and in memory where that differs."""
  # With the default memory both are the same number.
  texts = [f"peak {peak}" for peak in timeline.peak_activations]
  if timeline.peak_memory == timeline.peak_activations:
    return texts
  return [f"{text}, memory {x:g}" for text, x in zip(texts, timeline.peak_memory, strict=True)]
