"""Draws timelines of one schedule below each other on one time axis: a plan and what came of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxpipe.schedules.drawing.figure import draw_device, legend
from jaxpipe.schedules.drawing.text import title
from jaxpipe.schedules.simulate import Timeline

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_INCHES = 14.0
_ROW_INCHES = 0.45
_POINTS = 11.0
_IDLE = "#efefef"


def draw_panels(
  timelines: Mapping[str, Timeline],
  path: str | os.PathLike[str],
  form: str = "png",
  unit: str = "ms",
) -> None:
  """Draws timelines to a PNG or SVG file, each a panel with its name above it.

  Args:
    timelines: name -> timeline; all of one schedule.
    path: the file to write.
    form: `png` or `svg`.
    unit: name of the unit of their times.

  Raises:
    OSError: the file cannot be written.
  """
  # Imported inside: everything else in the package runs without matplotlib, and starts faster.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  any_of_them = next(iter(timelines.values()))
  P = any_of_them.schedule.devices
  height = len(timelines) * (_ROW_INCHES * P + 0.5) + 1.2
  figure = Figure(figsize=(_INCHES, height))
  figure.set_layout_engine("constrained")
  FigureCanvasAgg(figure)
  longest = max(timeline.makespan for timeline in timelines.values())
  panels = figure.subplots(len(timelines), sharex=True, squeeze=False)[:, 0]
  for axes, (name, timeline) in zip(panels, timelines.items(), strict=True):
    # The rows' names and the frame take about an inch.
    scale = (_INCHES - 1) / (longest or 1)
    for d in range(P):
      draw_device(axes, timeline, d, scale)
    _frame(axes, timeline, name, longest, unit)
  panels[-1].set_xlabel(
    f"time, {unit}; a box is one action, its number the microbatch; dotted: the end"
  )
  panels[-1].xaxis.label.set_size(_POINTS)
  figure.suptitle(title(any_of_them), x=0.01, ha="left", fontsize=_POINTS + 2)
  _, handles = legend(any_of_them)
  idle = Patch(facecolor=_IDLE, edgecolor="silver", label="idle")
  figure.legend(
    handles=[*handles, idle], loc="outside lower left", ncols=7, frameon=False, fontsize=_POINTS
  )
  figure.savefig(path, dpi=120, format=form)


def _frame(axes: Axes, timeline: Timeline, name: str, longest: float, unit: str) -> None:
  """Draws the axes of one panel, its heading, and a line where its timeline ends."""
  P = timeline.schedule.devices
  # Beyond the end, so that the line there is seen whole.
  axes.set_xlim(0, 1.01 * longest or 1)
  axes.set_ylim(P - 0.5, -0.5)
  axes.set_yticks(range(P), [f"device {d}" for d in range(P)])
  axes.tick_params(axis="y", length=0)
  axes.tick_params(labelsize=_POINTS)
  axes.set_facecolor(_IDLE)
  axes.spines[:].set_visible(False)
  # The bubble is what the eye should look for: the grey between boxes.
  idle = f"{timeline.bubble:.1%}".replace("%", " %")
  heading = f"{name}: {timeline.makespan:.4g} {unit}, {idle} of it idle"
  axes.set_title(heading, fontsize=_POINTS + 1, loc="left")
  # Where this one ends, beside the others.
  axes.axvline(timeline.makespan, color="black", lw=1.0, ls=":")


def scaled(timeline: Timeline, factor: float) -> Timeline:
  """Converts a timeline into another unit of time.

  Args:
    timeline: the timeline in the old unit.
    factor: new units in one old unit.

  Returns:
    The timeline with all its times multiplied by the factor.
  """
  return dataclasses.replace(
    timeline,
    start=_times(timeline.start, factor),
    end=_times(timeline.end, factor),
    busy=tuple(t * factor for t in timeline.busy),
  )


def _times(rows: tuple[tuple[float, ...], ...], factor: float) -> tuple[tuple[float, ...], ...]:
  """Multiplies the times of all devices' steps."""
  return tuple(tuple(t * factor for t in row) for row in rows)
