"""Timetables in docstrings."""

from jaxpipe.schedules import draw_text


def drawn_rows(timeline, width=None):
  """The rows of a drawing, without its title and summary."""
  return [line for line in draw_text(timeline, width).splitlines() if line.startswith("device")]


def documented_rows(module):
  """The rows of the timetable in a module's docstring."""
  lines = [line[2:] for line in module.__doc__.splitlines()]
  return [line for line in lines if line.startswith("device ") and "|" in line]
