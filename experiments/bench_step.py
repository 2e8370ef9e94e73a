"""Measures what a pipelined step costs, beside one device and beside the usual pipelines in JAX.

    ./launch/local.sh experiments/bench_step.py
    ./launch/local.sh experiments/bench_step.py --speedup --stages=2
    .venv/bin/python experiments/bench_step.py --stages=1 --chunks=4 --schedules=interleaved-1f1b \
      --dtype=bfloat16 --width=2048 --heads=16 --sequence_length=1024 --unroll=all

The first takes about ten minutes. It compares, in interleaved rounds in one process, with the same
weights, batch and rematerialization: gradient accumulation on one device, the two pipelines of
`baselines.py`, and every schedule of the registry (a refused one is listed with the reason). A
ratio is the median of the ratios round by round. Memory is what the compiled step allocates beside
its arguments and results. "vmap+roll blind" is what the usual remat policy makes of `vmap`: it
keeps layer inputs alone and computes all the rest twice. Targets: user CPU at most 1.05 of one
device, wall time at most 0.6 of vmap+roll, fused gpipe and 1f1b at most 0.6 of its memory.

The second takes about three minutes. It runs one process a device, each bound to a processor of its
own (see `one_thread`), and compares the speed-up over one device so bound with that of the tick
table at the F, I, W and head that are timed in the first process. What one device does, every
process does at the same time: processors share caches, memory and clock, and one whose neighbours
idle is faster than any device of a pipeline can be. "threads", CPU seconds over wall seconds of the
first process, must be 1 for one device: less means that others use the processor as well. Target:
at least 0.95 of what is predicted.

The third is for one GPU: all stages on it, against the plain step. Where the device's peak is known
there is a column "MFU". Target: at most 1.03 of the plain step's wall time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import baselines
import jax
import numpy as np
import one_thread
from absl import app, flags

import jaxpipe
from jaxpipe.models.transformer.config import TransformerConfig, flops_per_token
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.parallel.placing import layers_per_stage
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.layer.residuals import residual_policy
from jaxpipe.pipeline.table.tick_times import estimated_time
from jaxpipe.pipeline.table.unroll import SHAPES
from jaxpipe.schedules import schedule_names
from jaxpipe.training.chips import peak_flops
from jaxpipe.training.flags.flags import exit_with_error

_LAYERS = flags.DEFINE_integer("layers", 16, "Layers of the transformer.")
_WIDTH = flags.DEFINE_integer("width", 256, "Its width.")
_HEADS = flags.DEFINE_integer("heads", 4, "Its attention heads.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 128, "Tokens in a row.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Rows in a batch.")
_DEVICES = flags.DEFINE_integer("stages", 4, "Pipeline devices, P.")
_MICROBATCHES = flags.DEFINE_integer("microbatches", 8, "Microbatches, M.")
_RESIDUALS = flags.DEFINE_string(
  "residuals",
  "dots",
  "What F keeps: dots, all, full, a policy of jax.checkpoint_policies, names:A,B.",
)
_SCHEDULES = flags.DEFINE_list("schedules", [], "Schedules to run; none: all of them.")
_CHUNKS = flags.DEFINE_integer("chunks", 0, "Stages a device, V; 0: the schedule's own number.")
_UNROLL = flags.DEFINE_string("unroll", "auto", "Program shape: auto, none, ends, all.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the arithmetic.")
_BACKWARD = flags.DEFINE_multi_enum(
  "backward", [], ["fused", "split", "deferred"], "Builds each schedule so; repeat it for several."
)
_TICKS = flags.DEFINE_multi_enum(
  "ticks",
  ["early"],
  ["early", "kind"],
  "Of one program; repeat it for several. Where there are none, left out.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.")
_STEPS = flags.DEFINE_integer("steps", 2, "Steps per variant and round, after one to warm up.")
_SPEEDUP = flags.DEFINE_bool("speedup", False, "One thread a device: measured against predicted.")
_SLACK = flags.DEFINE_integer("slack", 0, "Ticks between send and use.")
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "What to print.")
_OUT = flags.DEFINE_string("out", "", "Writes it to this file as well.")

_PROCESS = flags.DEFINE_integer("process", -1, "Set by --speedup: number of this process.")
_PORT = flags.DEFINE_integer("port", 0, "Set by --speedup: where the processes meet.")

ONE, ROLL = "one device", "vmap+roll"


@dataclasses.dataclass
class Variant:
  """A way to run the step, and what was measured of it.

  Attributes:
    run: runs one step; returns arrays that need not be ready.
    temporary: MiB that the compiled step allocates on a device beside arguments and results.
    predicted: speed-up over one device by the tick table; 1 for one device itself.
    user: user CPU seconds of a step, by round.
    wall: wall seconds of a step, by round.
    threads: processors that were kept busy, by round: CPU seconds over wall seconds.
  """

  run: Callable[[], Any]
  temporary: float = 0.0
  predicted: float = 1.0
  user: list[float] = dataclasses.field(default_factory=list)
  wall: list[float] = dataclasses.field(default_factory=list)
  threads: list[float] = dataclasses.field(default_factory=list)

  def measure(self, steps: int) -> None:
    """Adds a round: user CPU and wall seconds of one step, and threads kept busy."""
    jax.block_until_ready(self.run())
    before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
      jax.block_until_ready(self.run())
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    self.user.append(user / steps)
    self.wall.append(wall / steps)
    self.threads.append((user + system) / wall)


def main(_: Any) -> None:
  try:
    schedules = asked()
  except ValueError as error:
    exit_with_error(error)
  if _SPEEDUP.value and _PROCESS.value < 0:
    sys.exit(one_thread.start_processes(_DEVICES.value))
  if _SPEEDUP.value:
    one_thread.join(_PROCESS.value, _DEVICES.value, _PORT.value)
  config = TransformerConfig(
    vocabulary_size=256,
    layers=_LAYERS.value,
    width=_WIDTH.value,
    heads=_HEADS.value,
    kv_heads=_HEADS.value,
    dtype=_DTYPE.value,
  )
  stack, shape = transformer(config), (_BATCH.value, _SEQUENCE.value)
  tokens = np.random.default_rng(0).integers(0, 256, shape, np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
  mesh = jaxpipe.make_mesh(f"stage:{_DEVICES.value}")
  variants, costs = one_device(stack, batch)
  if not _SPEEDUP.value:
    variants |= usual(stack, mesh, batch)
  pipelined, refused = registered(stack, mesh, batch, schedules, costs)
  variants |= pipelined
  for _ in range(_ROUNDS.value):
    for variant in variants.values():
      variant.measure(_STEPS.value)
  if _PROCESS.value <= 0:
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    flops = shape[0] * shape[1] * flops_per_token(config, shape[1])
    rows = [row(name, v, variants, peak and flops / peak) for name, v in variants.items()]
    write(rows, refused)


def one_device(stack: Any, batch: Any) -> tuple[dict[str, Variant], one_thread.Costs | None]:
  """Compiles gradient accumulation on one device, and, for `--speedup`, times its parts."""
  params = stack.init(jax.random.key(0), batch)
  M, residuals = _MICROBATCHES.value, _RESIDUALS.value
  step = jaxpipe.reference_value_and_grad(stack, M, residuals=residuals)
  costs = None
  if _SPEEDUP.value:
    costs = one_thread.timed_costs(stack, params, batch, M, residuals, seconds)
  return {ONE: compiled(step, params, batch)}, costs


def usual(stack: Any, mesh: Any, batch: Any) -> dict[str, Variant]:
  """Compiles the baselines."""
  shape = (stack, _DEVICES.value, _MICROBATCHES.value, mesh, _RESIDUALS.value)
  schedule = jaxpipe.make_schedule("gpipe", devices=shape[1], microbatches=shape[2])
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  steps = {
    ROLL: baselines.vmap_roll_value_and_grad(*shape),
    f"{ROLL} blind": baselines.vmap_roll_value_and_grad(*shape, blind_policy=True),
    "scan gpipe": baselines.scan_gpipe_value_and_grad(*shape),
  }
  return {name: compiled(step, params, batch) for name, step in steps.items()}


def asked() -> dict[str, jaxpipe.Schedule | str]:
  """Builds the schedules that the flags ask for, by label.

  Returns:
    For each label the schedule, or the reason why it cannot be built for these sizes.

  Raises:
    ValueError: flags that fit no schedule at all.
  """
  unknown = set(_SCHEDULES.value) - set(schedule_names())
  if unknown:
    known = ", ".join(schedule_names())
    raise ValueError(f"--schedules: unknown {', '.join(sorted(unknown))}; use some of {known}")
  shapes = ("auto", *SHAPES)
  if _UNROLL.value not in shapes:
    raise ValueError(f"--unroll={_UNROLL.value} is unknown; use {', '.join(shapes)}")
  if _BATCH.value % _MICROBATCHES.value:
    raise ValueError(
      f"--batch_size={_BATCH.value} rows are no multiple of --microbatches={_MICROBATCHES.value}"
    )
  if _SLACK.value not in (0, 1):
    raise ValueError(f"--slack={_SLACK.value} ticks cannot be executed; use 0 or 1")
  if _LAYERS.value % _DEVICES.value:  # the baselines have one stage a device
    raise ValueError(f"--layers={_LAYERS.value} cannot fill --stages={_DEVICES.value} evenly")
  residual_policy(_RESIDUALS.value)
  found: dict[str, jaxpipe.Schedule | str] = {}
  for label, options in requests():
    try:
      schedule = jaxpipe.make_schedule(
        devices=_DEVICES.value,
        microbatches=_MICROBATCHES.value,
        chunks=_CHUNKS.value or None,
        **options,
      )
      layers_per_stage(_LAYERS.value, schedule)
      found[label] = schedule
    except ValueError as error:
      found[label] = str(error)
  return found


def registered(
  stack: Any,
  mesh: Any,
  batch: Any,
  schedules: dict[str, jaxpipe.Schedule | str],
  costs: one_thread.Costs | None,
) -> tuple[dict[str, Variant], dict[str, str]]:
  """Compiles the schedules; returns also those that these sizes do not allow, with the reason."""
  variants, refused = {}, {}
  for label, schedule in schedules.items():
    if isinstance(schedule, str):
      refused[label] = schedule
      continue
    options: dict[str, Any] = dict(residuals=_RESIDUALS.value, slack=_SLACK.value)
    step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll=_UNROLL.value, **options)
    params = stack.init(jax.random.key(0), batch, schedule, mesh)
    variants[label] = compiled(step, params, batch)
    if costs:
      times, work = costs(schedule.stages)
      execution = Execution.of(stack, schedule, mesh, **options)
      parts = execution.segments(_UNROLL.value)
      ticks = estimated_time(execution.program, parts, times, blocking=True)
      variants[label].predicted = _MICROBATCHES.value * work / ticks
  return variants, refused


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields label and options of every schedule that the flags ask for."""
  names = _SCHEDULES.value or schedule_names()
  backwards: list[str | None] = [*_BACKWARD.value] or [None]
  for name, ticks, backward in itertools.product(names, _TICKS.value, backwards):
    by_kind = ["by kind"] * (ticks == "kind")
    label = " ".join([name, *([backward] if backward else []), *by_kind])
    yield label, {"name": name, "backward": backward, "ticks": ticks}


def compiled(step: Any, *arguments: Any) -> Variant:
  """Compiles a step for these arguments."""
  program = jax.jit(step).lower(*arguments).compile()
  analysis = program.memory_analysis()  # not every platform has one
  temporary = analysis.temp_size_in_bytes / 2**20 if analysis else float("nan")
  return Variant(lambda: program(*arguments), temporary)


def seconds(*programs: tuple[Any, ...]) -> list[float]:
  """Times each `(function, *arguments)` in interleaved rounds; returns median wall seconds."""
  variants = [compiled(*program) for program in programs]
  for _ in range(2 * _ROUNDS.value):
    for variant in variants:
      variant.measure(2 * _STEPS.value)
  return [statistics.median(variant.wall) for variant in variants]


def row(name: str, v: Variant, variants: dict[str, Variant], least: float | None) -> dict[str, Any]:
  """Returns one line of the table, by column.

  Args:
    name: of the variant.
    v: the variant.
    variants: all of them, by name, for the ratios to one device and to vmap+roll.
    least: seconds that a step's FLOPs take one device at its peak; None if unknown: no MFU then.
  """
  one, roll = variants[ONE], variants.get(ROLL)
  cells = {"": name, "wall_s_min": min(v.wall), "wall_s_median": statistics.median(v.wall)}
  if _SPEEDUP.value:
    speedup = ratio(one.wall, v.wall)
    threads = statistics.median(v.threads)
    measured = {"threads": threads, "speedup": speedup, "predicted": v.predicted}
    return cells | measured | {"of_predicted": speedup / v.predicted}
  cells |= {"wall/one": ratio(v.wall, one.wall)}
  cells |= {"user_s_min": min(v.user), "user_s_median": statistics.median(v.user)}
  cells |= {"user/one": ratio(v.user, one.user), "MiB": v.temporary}
  if least:
    devices = 1 if name == ONE else _DEVICES.value
    cells |= {"MFU": least / statistics.median(v.wall) / devices}
  if roll:
    cells |= {"wall/roll": ratio(v.wall, roll.wall), "MiB/roll": v.temporary / roll.temporary}
  return cells


def ratio(these: Sequence[float], base: Sequence[float]) -> float:
  """Returns the median of the ratios round by round."""
  return statistics.median(a / b for a, b in zip(these, base, strict=True))


def write(rows: list[dict[str, Any]], refused: dict[str, str]) -> None:
  """Prints the table, and writes it where `--out` says."""
  names = (
    *("layers", "width", "heads", "sequence_length", "batch_size", "stages", "microbatches"),
    *("chunks", "residuals", "dtype", "unroll", "slack", "speedup", "rounds", "steps"),
  )
  setting = {name: flags.FLAGS[name].value for name in names}
  setting |= {"jax": jax.__version__, "platform": jax.devices()[0].platform}
  if _FORMAT.value == "json":
    text = json.dumps({"setting": setting, "rows": rows, "refused": refused}, indent=2)
  else:
    wide = max(len(r[""]) for r in rows)
    lines = [", ".join(f"{name}={value}" for name, value in setting.items())]
    lines.append(f"{'':{wide}}" + "".join(f"{key:>15}" for key in rows[0] if key))
    for r in rows:
      cells = (f"{value:15.3f}" for key, value in r.items() if key)
      lines.append(f"{r['']:{wide}}" + "".join(cells))
    text = "\n".join([*lines, *(f"{name}: refused: {why}" for name, why in refused.items())])
  print(text)
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(text + "\n")


if __name__ == "__main__":
  app.run(main)
