"""Writes docs/schedules.md and its pictures from the library.

    .venv/bin/python docs/make/schedules.py

Takes about a minute. All that can be computed is computed; the rest of the page stands in the
registry (`jaxpipe/schedules/registry.py`), beside the schedules.
"""

import inspect
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxpipe.schedules import (
  Costs,
  Schedule,
  Timeline,
  compare,
  draw_figure,
  make_schedule,
  simulate,
)
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

## Ticks by kind

One program runs on all devices, and devices that exchange on a tick wait for one another: a tick on
which one does F beside its neighbour's B lasts as long as B. With `ticks="kind"` (`--ticks kind`)
all devices do F, or B, or I, or W on a tick, and a device without such an action may do a W that
has waited, as a guest. F and B of different microbatches take turns, so that what travels has the
other kind's tick to arrive in. Files hold the ticks (JSON), and the executor runs these very ones.

P=8, M=32; F, I and W of a device's whole part taking 1, 1.4 and 0.8, no hop. Times over the work of
a device alone, by `simulate`: *free* devices wait for inputs alone; *early* and *slack 1* are one
loop over early ticks (`execution="coupled"`), with slack 0 and 1; *by kind* waits at every tick
for all devices (`execution="barrier"`). Chunks are the most that a device holds, early and by kind.

{lock_step}

1F1B by kind has ticks X X W in its own memory, an X tick being F or I, so that its backward is
split. Zero bubble, with (V+1) P - 1 chunks on device 0, is then as long as with free devices from
M = 2P on, and no order over a loop is shorter where W is no longer than F and I. `zb-v` takes
`memory_limit`: 2P to 3P - 2 chunks, fewer being longer.

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
  head = HEAD.format(flags=FLAGS, table=table(), lock_step=lock_step())
  return "\n".join([head, *(section(name, family) for name, family in FAMILIES.items())])


def table() -> str:
  """Returns the table that compares all schedules at P=4, M=8."""
  lines = [
    "| schedule | V | makespan | bubble | span bubble | peak chunks | peak share |",
    "|---|---|---|---|---|---|---|",
  ]
  for entry in compare(**SIZES, costs=Costs(12, 12, 12)):
    if entry.timeline is not None:
      lines.append(row(entry.label, entry.timeline))
  return "\n".join(lines)


def lock_step() -> str:
  """Returns the table that compares times of free devices with those of one program."""
  P, M, whole = 8, 32, (1.0, 1.4, 0.8)
  lines = [
    "| schedule | V | free | early | slack 1 | by kind | chunks | chunks by kind |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name, family in FAMILIES.items():
    for chunks in (2, 4) if family.any_chunks and family.chunks == 2 else (family.chunks,):
      # Where every stage has two replicas, a device's part is of V/2 stages.
      plain = make_schedule(name, devices=P, microbatches=M, chunks=chunks)
      if plain.paths is not None:
        continue  # its microbatches skip stages: less work
      costs = Costs(*(time * P / plain.stages for time in whole))
      sizes = {"devices": P, "microbatches": M, "chunks": chunks, "costs": costs}
      early = make_schedule(name, **sizes)
      kind = make_schedule(name, **sizes, ticks="kind") if family.by_kind else None
      ways = [(early, "free", 0), (early, "coupled", 0), (early, "coupled", 1)]
      ways += [(kind, "barrier", 0)] if kind else []
      lines.append(lock_step_row(name, chunks, ways, costs, M * sum(whole)))
  return "\n".join(lines)


def lock_step_row(
  name: str, chunks: int, ways: list[tuple[Schedule, str, int]], costs: Costs, work: float
) -> str:
  """Returns a schedule's row of that table; without ticks by kind, with dashes."""
  times, peaks = [], []
  for schedule, execution, slack in ways:
    timeline = simulate(schedule, costs, execution=execution, slack=slack)
    times.append(f"{timeline.makespan / work:.3f}")
    peaks.append(f"{max(timeline.peak_activations)}")
  dash = ["-"] * (4 - len(ways))
  cells = [name, f"{chunks}", *times, *dash, peaks[0], *(peaks[3:] or dash)]
  return f"| {' | '.join(cells)} |"


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
