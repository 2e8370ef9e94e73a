"""Pipeline schedules as data: which device does which work, in which order.

A schedule is built by name, read from a file or written by hand, then checked, simulated and drawn
on paper. The executor runs those of the kinds that have a code in `kinds.py`. Nothing below this
folder imports JAX, so that the command line `python -m jaxpipe.schedules` starts without loading
it.

  schedule = make_schedule("1f1b", devices=4, microbatches=8)
  print(draw_text(simulate(schedule)))

Open `kinds.py`, `actions.py` and `schedule.py` first; `families/one_f_one_b.py` is the shortest
path from a paper's figure to a schedule.
"""

from jaxpipe.schedules.actions import Action, Overlap, ScheduleError
from jaxpipe.schedules.build import make_schedule, schedule_names
from jaxpipe.schedules.checks.legal import check
from jaxpipe.schedules.checks.sends import check_sends
from jaxpipe.schedules.command.compare import compare
from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.drawing.figure import draw_figure
from jaxpipe.schedules.drawing.text import draw_perfetto, draw_text
from jaxpipe.schedules.interchange import from_csv, from_json, to_csv, to_json
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.peaks import Peaks, peaks
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline, simulate
from jaxpipe.schedules.walk import dependencies

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
