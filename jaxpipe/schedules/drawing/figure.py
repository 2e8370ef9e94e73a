"""Draws timetables as pictures, in the style of the papers' figures.

The microbatch's number stands in the box; the colour is the kind and the shade the chunk, as in
Megatron's figures (Narayanan et al., 2021, arXiv:2104.04473).
"""

import os
from typing import TYPE_CHECKING

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.drawing.text import cells, summary, title
from jaxpipe.schedules.kinds import STAGE_KINDS, Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.patches import Patch

# A row holds one line of 9-point figures with air around it.
_ROW_INCHES = 0.40
# Beyond, numbers are left out rather than the picture made larger than viewers open.
_MOST_INCHES = 60.0
_POINTS_PER_INCH = 72


def draw_figure(timeline: Timeline, path: str | os.PathLike[str], form: str = "png") -> None:
  """Draws a timetable to a PNG or SVG file.

  Args:
    timeline: what to draw.
    path: the file to write.
    form: `png` or `svg`.

  Raises:
    OSError: the file cannot be written.
  """
  # Imported here: everything else in the package runs without matplotlib, and starts faster.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  P = timeline.schedule.devices
  inches = _width(timeline)
  # A wide figure is looked at from further away, so its words grow with it.
  points = min(max(9.0, 0.6 * inches), 15.0)
  figure = Figure(figsize=(inches + 0.2 * points, _ROW_INCHES * P + 0.16 * points))
  # Constrained layout: only matplotlib knows the sizes of the words in legend and peaks.
  figure.set_layout_engine("constrained")
  # Not pyplot, which keeps every figure alive and asks for a display.
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  scale = inches / (timeline.makespan or 1)
  for d in range(P):
    draw_device(axes, timeline, d, scale)
  _draw_frame(axes, timeline, points)
  kinds, handles = legend(timeline)
  # One column per kind, its chunks below each other.
  columns = kinds if timeline.schedule.chunks > 1 else len(handles)
  figure.legend(
    handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=points
  )
  figure.savefig(path, dpi=150, format=form)


def _width(timeline: Timeline) -> float:
  """Returns the inches of the time axis at which every box is wide enough for its number."""
  digits = len(str(timeline.schedule.microbatches - 1))
  # The shortest box holds its number at about 9 points.
  wanted = 0.07 * digits + 0.08
  shortest = min(
    (
      end - start
      for d in range(timeline.schedule.devices)
      for _, start, end in cells(timeline, d)
      if end > start
    ),
    default=1.0,
  )
  return min(max(6.0, timeline.makespan / shortest * wanted), _MOST_INCHES)


def draw_device(axes: "Axes", timeline: Timeline, d: int, scale: float) -> None:
  """Draws one device's row of boxes, each with the number of its microbatch.

  Args:
    axes: axes whose x is time and whose y is the device.
    timeline: the schedule in time.
    d: the device.
    scale: inches per unit of time, for the size of the numbers.
  """
  for step, start, end in cells(timeline, d):
    # The parts of an overlapped pair share a box, one above the other.
    height = 0.94 / len(step.parts)
    for i, action in enumerate(step.parts):
      y = d + (i - (len(step.parts) - 1) / 2) * height
      colour, dark = _colour(timeline.schedule, d, action)
      # White edges tell neighbours of one colour apart.
      axes.barh(y, end - start, left=start, height=height, color=colour, edgecolor="white", lw=0.7)
      text = str(action.microbatch)
      # The number fills the box's width up to a size that suits its height.
      width = (end - start) * scale * _POINTS_PER_INCH
      size = min(9.0 / len(step.parts) ** 0.5, width / (0.62 * len(text) + 0.35))
      # Below 3 points a number is a smudge; the colour still tells the kind.
      if size >= 3:
        place = {"ha": "center", "va": "center_baseline", "fontsize": size}
        axes.text((start + end) / 2, y, text, color="white" if dark else "black", **place)


def _colour(schedule: Schedule, d: int, action: Action) -> tuple[tuple[float, float, float], bool]:
  """Returns an action's colour, the kind's in the shade of the chunk, and whether it is dark."""
  chunk = schedule.placement.chunk(d, action.stage) if action.kind in STAGE_KINDS else 0
  return _shade(action.kind, chunk, schedule.chunks)


def _shade(kind: Kind, chunk: int, chunks: int) -> tuple[tuple[float, float, float], bool]:
  """Returns a kind's colour for one chunk, darkest for the first, and whether it is dark."""
  # Never all the way to white, which is for edges.
  lighter = 0.55 * chunk / max(chunks - 1, 1)
  red, green, blue = (c + (1 - c) * lighter for c in kind.info.colour)
  # Rec. 601 weights: enough to choose between black and white digits.
  luminance = 0.299 * red + 0.587 * green + 0.114 * blue
  return (red, green, blue), luminance < 0.55


def _draw_frame(axes: "Axes", timeline: Timeline, points: float) -> None:
  """Draws the axes, the title with both bubbles, and each device's peak beside its row."""
  P = timeline.schedule.devices
  axes.set_xlim(0, timeline.makespan or 1)
  # Device 0 on top, as in the papers.
  axes.set_ylim(P - 0.5, -0.5)
  axes.set_yticks(range(P), [f"device {d}" for d in range(P)])
  axes.tick_params(axis="y", length=0)
  axes.tick_params(labelsize=points)
  axes.set_facecolor("#efefef")
  axes.spines[:].set_visible(False)
  axes.set_xlabel("time", fontsize=points)
  heading = f"{title(timeline)}\n{summary(timeline)}"
  axes.set_title(heading, fontsize=points + 1, loc="left", pad=points)
  # x as a share of the width, y as a row: peaks stay beside their rows at any scale.
  right = axes.get_yaxis_transform()
  memory = timeline.peak_memory != timeline.peak_activations
  for d in range(P):
    text = f"  {timeline.peak_activations[d]}"
    if memory:
      text += f" ({timeline.peak_memory[d]:g})"
    axes.text(1.0, d, text, transform=right, va="center", fontsize=points)
  caption = " peak (memory)" if memory else " peak"
  axes.text(1.0, -0.6, caption, transform=right, va="bottom", fontsize=points)


def legend(timeline: Timeline) -> tuple[int, list["Patch"]]:
  """Makes the entries of a legend.

  Args:
    timeline: the schedule in time.

  Returns:
    The number of kinds that occur, and one handle for each kind and chunk.
  """
  from matplotlib.patches import Patch

  schedule = timeline.schedule
  used = {action.kind for row in schedule.order for step in row for action in step.parts}
  # Only the kinds that occur, in the order of `Kind`, whatever the schedule starts with.
  handles = [
    Patch(
      color=_shade(kind, v, schedule.chunks)[0],
      label=kind.info.legend
      + (f", chunk {v}" if schedule.chunks > 1 and kind in STAGE_KINDS else ""),
    )
    for kind in Kind
    if kind in used
    for v in range(schedule.chunks if kind in STAGE_KINDS else 1)
  ]
  return len(used), handles
