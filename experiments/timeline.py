"""Measures what every device of a pipelined step does when, and compares the simulator's plan.

    ./launch/local.sh experiments/timeline.py --schedule=1f1b --stages=2 --microbatches=8
    ./launch/local.sh experiments/timeline.py --one_thread --schedule=zb-h1 --stages=2

Each takes less than half a minute. It runs one training step several times, with a reading of the
clock before and after every action of every device, and in turn without; plans the step from the
mean duration of every action on every stage; and prints the plan beside what was measured. It
writes `timeline.png` (planned above, measured below) and `timeline.json`, for
https://ui.perfetto.dev.

Expected, with --one_thread (a process for each device, each bound to a processor of its own):
predicted ticks close to the measured ones. Without, forced CPU devices share the machine's
threads, so that an action is the faster the fewer devices work beside it, and a plan from mean
durations may be off by a tenth; docs/speed.md has figures of both.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import numpy as np
import one_thread
from absl import app, flags

import jaxpipe
from jaxpipe.models.transformer.decoder import TransformerConfig, transformer
from jaxpipe.pipeline.timeline import Measured, measure
from jaxpipe.schedules.drawing.panels import draw_panels, scaled
from jaxpipe.schedules.drawing.text import draw_traces

_SCHEDULE = flags.DEFINE_string("schedule", "1f1b", "Name of a schedule.")
_BACKWARD = flags.DEFINE_enum(
  "backward", None, ["fused", "split", "deferred"], "How its backward pass is cut."
)
_TICKS = flags.DEFINE_enum("ticks", "early", ["early", "kind"], "Early, or by kind.")
_DEVICES = flags.DEFINE_integer("stages", 2, "Pipeline devices, P.")
_MICROBATCHES = flags.DEFINE_integer("microbatches", 8, "Microbatches, M.")
_LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the transformer.")
_WIDTH = flags.DEFINE_integer("width", 256, "Its width.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 128, "Tokens in a row.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Rows in a batch.")
_RESIDUALS = flags.DEFINE_string("residuals", "dots", "What F keeps; see experiments/lm.py --help.")
_SLACK = flags.DEFINE_integer("slack", 0, "Ticks between send and use.")
_UNROLL = flags.DEFINE_enum(
  "unroll", "auto", ["auto", "none", "ends", "all"], "Shape of the program."
)
_STEPS = flags.DEFINE_integer("steps", 5, "Steps that are timed; every figure is a median of them.")
_ONE_THREAD = flags.DEFINE_bool("one_thread", False, "A process and a processor for each device.")
_OUT = flags.DEFINE_string("out", "runs/timeline", "Folder to write to.")

_PROCESS = flags.DEFINE_integer("process", -1, "Set by --one_thread: number of this process.")
_PORT = flags.DEFINE_integer("port", 0, "Set by --one_thread: where the processes meet.")


def main(_: Any) -> None:
  if _ONE_THREAD.value and _PROCESS.value < 0:
    sys.exit(one_thread.start_processes(_DEVICES.value))
  if _ONE_THREAD.value:
    one_thread.join(_PROCESS.value, _DEVICES.value, _PORT.value)
  try:
    measured = run()
  except ValueError as error:
    sys.exit(f"timeline.py: {error}")
  if _PROCESS.value <= 0:
    print(table(measured))
    write(measured, pathlib.Path(_OUT.value))


def run() -> Measured:
  """Measures the step that the flags describe."""
  config = TransformerConfig(
    vocabulary_size=256, layers=_LAYERS.value, width=_WIDTH.value, heads=4, kv_heads=4
  )
  stack, shape = transformer(config), (_BATCH.value, _SEQUENCE.value)
  tokens = np.random.default_rng(0).integers(0, 256, shape, np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
  schedule = jaxpipe.make_schedule(
    _SCHEDULE.value,
    devices=_DEVICES.value,
    microbatches=_MICROBATCHES.value,
    backward=_BACKWARD.value,
    ticks=_TICKS.value,
  )
  mesh = jaxpipe.make_mesh(f"stage:{_DEVICES.value}")
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  return measure(
    stack,
    schedule,
    mesh,
    params,
    batch,
    steps=_STEPS.value,
    slack=_SLACK.value,
    unroll=_UNROLL.value,
    residuals=_RESIDUALS.value,
  )


def table(m: Measured) -> str:
  """Formats durations by stage, and the step: what was planned beside what was measured."""
  schedule = m.timeline.schedule
  kinds = {action.kind for row in schedule.order for step in row for action in step.parts}
  durations, ticks = m.costs.durations(schedule.stages), m.timeline.makespan
  lines = [
    f"{schedule.name}, {jax.default_backend()}, jax {jax.__version__};"
    f" times in ms, medians of {_STEPS.value} steps",
    "mean duration by stage",
    *(
      f"  {kind}  " + " ".join(f"{1e3 * x:8.2f}" for x in row)
      for kind, row in durations.items()
      if kind in kinds
    ),
    f"  exchange with the neighbours {1e3 * m.hop:.2f}",
    f"{'':30}{'predicted':>12}{'measured':>12}{'ratio':>8}",
    line("ticks", m.planned().makespan, ticks),
    line("ticks, each duration its own", m.replayed().makespan, ticks),
    line("step, clock read", m.predicted_step, ticks + m.outside),
    line("step, clock not read", m.predicted_step, m.step),
    f"  of the step, {1e3 * m.outside:.2f} before the first action and after the last;",
    f"  were no tick to wait for a neighbour that sends it nothing, the ticks would take"
    f" {1e3 * m.free().makespan:.2f}",
  ]
  return "\n".join(lines)


def line(name: str, predicted: float, measured: float) -> str:
  """Formats a row of the table; times in seconds, printed in ms."""
  cells = f"{1e3 * predicted:12.2f}{1e3 * measured:12.2f}{predicted / measured:8.3f}"
  return f"{name:30}{cells}"


def write(measured: Measured, folder: pathlib.Path) -> None:
  """Writes the picture and the trace."""
  folder.mkdir(parents=True, exist_ok=True)
  timelines = {
    "planned, from the mean durations": scaled(measured.planned(), 1e3),
    "measured": scaled(measured.timeline, 1e3),
  }
  draw_panels(timelines, folder / "timeline.png")
  (folder / "timeline.json").write_text(draw_traces(timelines))
  print(f"wrote {folder}/timeline.png and timeline.json")


if __name__ == "__main__":
  app.run(main)
