"""Pipeline schedules as data: built, checked, simulated and drawn. No JAX in here.

schedule = make_schedule("1f1b", devices=4, microbatches=8)
print(draw_text(simulate(schedule)))
"""

from jaxpipe.schedules.actions import Action, Kind, Overlap, ScheduleError
from jaxpipe.schedules.build import make_schedule, schedule_names
from jaxpipe.schedules.checks.legal import check, dependencies
from jaxpipe.schedules.checks.sends import check_sends
from jaxpipe.schedules.command.compare import compare
from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.drawing.figure import draw_figure
from jaxpipe.schedules.drawing.text import draw_perfetto, draw_text
from jaxpipe.schedules.interchange import from_csv, from_json, to_csv, to_json
from jaxpipe.schedules.peaks import Peaks, peaks
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline, simulate

__all__ = [
  "Action",
  "Costs",
  "Kind",
  "Overlap",
  "Peaks",
  "Placement",
  "Schedule",
  "ScheduleError",
  "Timeline",
  "check",
  "check_sends",
  "compare",
  "dependencies",
  "draw_figure",
  "draw_perfetto",
  "draw_text",
  "from_csv",
  "from_json",
  "make_schedule",
  "peaks",
  "schedule_names",
  "simulate",
  "to_csv",
  "to_json",
]
