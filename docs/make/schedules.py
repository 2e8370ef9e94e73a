"""Writes docs/schedules.md and its pictures from the library.

    .venv/bin/python docs/make/schedules.py

Takes about a minute. All that can be computed is computed; the rest of the page stands in the
registry (`jaxpipe/schedules/registry.py`), beside the schedules.
"""

import inspect
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxpipe.schedules import Timeline, compare, draw_figure, make_schedule, simulate
from jaxpipe.schedules.registry import FAMILIES, Family

PAGE = pathlib.Path(__file__).parents[1] / "schedules.md"
PICTURES = pathlib.Path(__file__).parents[1] / "images" / "schedules"
SIZES = {"devices": 4, "microbatches": 8}
FLAGS = "--devices 4 --microbatches 8"

HEAD = """\
# Schedules

Every schedule is data: a list of actions per device, built by name, from PyTorch's CSV or by hand,
and checked, simulated and drawn by one library that does not need JAX.

```
.venv/bin/python -m jaxpipe.schedules zb-h1 {flags}        # a timetable in the terminal
.venv/bin/python -m jaxpipe.schedules zb-h1 {flags} --format png --out x.png
.venv/bin/python -m jaxpipe.schedules compare {flags} --memory_limit 4   # all that fit, best first
```

P devices, M microbatches, V chunks per device; F forward, I gradient of the input, W gradient of
the weights, B both. Two bubbles: over the *makespan*, which a jitted step pays, and over the
*span* of the longest single device, which zero-bubble papers print. Peaks count chunks held at
once by a device, each a V-th of its part of the model (where every stage has two replicas, a device
holds V/2 chunks of each).

A chunk counts from its F until its W or B, whatever its bytes. Schedules with I and W may hold more
bytes a chunk than those with B, for between I and W they also keep what W reads; how much that is
depends on what F keeps (`residuals`). At P=4 V-Half holds 6 half-size chunks where 1F1B holds 8,
and needs almost as many bytes under the default policy:
[bytes of every schedule](memory.md#predicted-and-compiled),
[what zero bubble costs](memory.md#what-zero-bubble-costs).

The executor runs every schedule of this page, also with recomputation (R) and with vocabulary
passes (S and T, one barrier). An overlapped pair (DualPipe) is two ticks there, one after the
other. Frozen layers in the bubbles (`--fillers`, Y) and optimizer actions (`--post_validation`, U)
are built, checked, simulated and drawn only: the executor refuses a schedule that has them.

## All at once

P=4, M=8, F, I and W of a device's whole part taking 12 each, no hop; `makespan` of the work alone
is 288. Those that skip stages do less work and stand at the end.

{table}

This page is written by `.venv/bin/python docs/make/schedules.py`.
"""

SECTION = """\
## {name}

{summary}. {source}

![{name}](images/schedules/{name}.png)

- **Bubble**: {bubble}
- **Peak**: {peak}
- **When**: {use}
- **Options**: {options}
- `.venv/bin/python -m jaxpipe.schedules {name} {flags}`
"""


def page() -> str:
  """Returns the whole text of the page."""
  head = HEAD.format(flags=FLAGS, table=table())
  return "\n".join([head, *(section(name, family) for name, family in FAMILIES.items())])


def table() -> str:
  """Returns the table that compares all schedules at P=4, M=8."""
  from jaxpipe.schedules import Costs

  lines = [
    "| schedule | V | makespan | bubble | span bubble | peak chunks | peak share |",
    "|---|---|---|---|---|---|---|",
  ]
  for entry in compare(**SIZES, costs=Costs(12, 12, 12)):
    if entry.timeline is not None:
      lines.append(row(entry.label, entry.timeline))
  return "\n".join(lines)


def row(label: str, timeline: Timeline) -> str:
  """Returns a schedule's row of that table."""
  return (
    f"| {label} | {timeline.schedule.chunks} | {timeline.makespan:g} | {timeline.bubble:.1%} |"
    f" {timeline.span_bubble:.1%} | {max(timeline.peak_activations)} |"
    f" {max(timeline.peak_memory):g} |"
  )


def section(name: str, family: Family) -> str:
  """Returns the section of one schedule."""
  module = inspect.getmodule(family.build)
  assert module is not None and module.__doc__ is not None
  source = module.__doc__.split("\n\n")[0].replace("\n", " ")
  options = [f"`{option}`: {meaning}" for option, meaning in family.options.items()]
  if family.any_chunks:
    options.insert(0, f"`chunks` (default {family.chunks})")
  ways = {
    "fused": "`backward` fused (default), split or deferred",
    "split": "`backward` is split",
    "mixed": "`backward` is partly fused, or all split",
  }
  return SECTION.format(
    name=name,
    summary=family.summary[0].upper() + family.summary[1:],
    source=source,
    bubble=family.bubble,
    peak=family.peak,
    use=family.use,
    options="; ".join([*options, ways[family.backward]]),
    flags=FLAGS,
  )


def draw() -> None:
  """Draws one picture for every schedule."""
  PICTURES.mkdir(parents=True, exist_ok=True)
  for name in FAMILIES:
    draw_figure(simulate(make_schedule(name, **SIZES)), PICTURES / f"{name}.png")


if __name__ == "__main__":
  draw()
  PAGE.write_text(page())
