"""Writes docs/scaling.md and its picture: time to build, check and simulate schedules.

    .venv/bin/python docs/make/scaling.py

P=64, V=4 (or a family's own number), M from 32 to 1,024. Takes about five minutes.
"""

import gc
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxpipe.schedules import schedule_names, simulate
from jaxpipe.schedules.build import make_schedule
from jaxpipe.schedules.registry import FAMILIES

PICTURE = pathlib.Path(__file__).parents[1] / "images" / "scaling.png"
PAGE = pathlib.Path(__file__).parents[1] / "scaling.md"
DEVICES = 64
MICROBATCHES = (32, 64, 128, 256, 512, 1024)
SEARCHES = {"zb-auto"}


def measure(name: str, microbatches: int) -> tuple[int, float]:
  """Returns the number of actions, and the CPU seconds to build, check and simulate."""
  family = FAMILIES[name]
  chunks = 4 if family.any_chunks else family.chunks
  gc.collect()
  start = time.process_time()
  # Building checks.
  schedule = make_schedule(name, devices=DEVICES, microbatches=microbatches, chunks=chunks)
  simulate(schedule)
  return sum(map(len, schedule.order)), time.process_time() - start


def main() -> None:
  """Measures, draws, and writes the page."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 5))
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  lines = [
    "# Time to build, check and simulate",
    "",
    "P=64, V=4 where a family takes any number, CPU seconds of one core; no searches.",
    "Written by `.venv/bin/python docs/make/scaling.py`.",
    "",
    "![time against size](images/scaling.png)",
    "",
    "| schedule | " + " | ".join(f"M={m}" for m in MICROBATCHES) + " | actions | us per action |",
    "|---" * (len(MICROBATCHES) + 3) + "|",
  ]
  for i, name in enumerate(name for name in schedule_names() if name not in SEARCHES):
    points = [measure(name, m) for m in MICROBATCHES]
    marker = "os^vD*"[i % 6]
    axes.loglog(*zip(*points, strict=True), marker=marker, ms=4, lw=1, label=name)
    actions, seconds = points[-1]
    cells = " | ".join(f"{seconds:.2f}" for _, seconds in points)
    lines.append(f"| {name} | {cells} | {actions:,} | {seconds / actions * 1e6:.1f} |")
    print(lines[-1], flush=True)
  axes.set_xlabel("actions")
  axes.set_ylabel("CPU seconds to build, check and simulate")
  axes.axhline(10, color="grey", lw=0.8, ls="--")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=7, ncols=2)
  figure.savefig(PICTURE, dpi=120)
  PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
