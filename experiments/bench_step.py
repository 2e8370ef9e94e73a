"""What does a pipelined step cost beside plain gradient accumulation on one device?

    ./launch/local.sh experiments/bench_step.py

Takes about two minutes. Prints, for one device and for every schedule, user CPU seconds and wall
seconds of a training step (minimum and median over interleaved rounds), their ratio to the
one-device row with the same rematerialization, and the compiler's temporary memory per device.
Expect user CPU ratios of at most 1.1.
"""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

import jaxpipe
from jaxpipe.models.transformer import TransformerConfig, transformer

_LAYERS = flags.DEFINE_integer("layers", 16, "Layers of the transformer.")
_WIDTH = flags.DEFINE_integer("width", 256, "Its width.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 128, "Tokens in a row.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Rows in a batch.")
_DEVICES = flags.DEFINE_integer("stages", 4, "Pipeline devices, P.")
_MICROBATCHES = flags.DEFINE_integer("microbatches", 8, "Microbatches, M.")
_RESIDUALS = flags.DEFINE_enum("residuals", "dots", ["dots", "all", "full"], "What F keeps.")
_SCHEDULES = flags.DEFINE_list("schedules", "gpipe,1f1b", "Schedules, fused and split each.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Interleaved rounds.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps per variant and round.")


def main(_: Any) -> None:
  config = TransformerConfig(
    vocabulary_size=256, layers=_LAYERS.value, width=_WIDTH.value, heads=4, kv_heads=4
  )
  stack = transformer(config)
  shape = (_BATCH.value, _SEQUENCE.value)
  tokens = np.random.default_rng(0).integers(0, 256, shape, np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
  variants = {"one device": one_device(stack, batch)}
  for name in _SCHEDULES.value or []:
    for backward in ("fused", "split"):
      variants[f"{name} {backward}"] = pipelined(stack, batch, name, backward)
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
  for _ in range(_ROUNDS.value):
    for name, (run, _) in variants.items():
      times[name].append(measure(run))
  report(times, {name: memory for name, (_, memory) in variants.items()})


def one_device(stack: Any, batch: Any) -> tuple[Callable[[], Any], float]:
  """Gradient accumulation over the same microbatches, by `jax.grad`, on the first device."""
  params = stack.init(jax.random.key(0), batch)
  step = jaxpipe.reference_value_and_grad(stack, _MICROBATCHES.value, residuals=_RESIDUALS.value)
  compiled = jax.jit(step).lower(params, batch).compile()
  return lambda: compiled(params, batch), temporary(compiled)


def pipelined(stack: Any, batch: Any, name: str, backward: str) -> tuple[Callable[[], Any], float]:
  """The same step over the pipeline."""
  schedule = jaxpipe.make_schedule(
    name, devices=_DEVICES.value, microbatches=_MICROBATCHES.value, backward=backward
  )
  mesh = jaxpipe.make_mesh(f"stage:{_DEVICES.value}")
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, residuals=_RESIDUALS.value)
  compiled = jax.jit(step).lower(params, batch).compile()
  return lambda: compiled(params, batch), temporary(compiled)


def temporary(compiled: Any) -> float:
  """MiB per device that the compiled step allocates for itself."""
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def measure(run: Callable[[], Any]) -> tuple[float, float]:
  """User CPU seconds and wall seconds of one step."""
  jax.block_until_ready(run())
  cpu, wall = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
  for _ in range(_STEPS.value):
    jax.block_until_ready(run())
  wall = time.perf_counter() - wall
  cpu = resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu
  return cpu / _STEPS.value, wall / _STEPS.value


def report(times: dict[str, list[tuple[float, float]]], memory: dict[str, float]) -> None:
  """Prints a row a variant; ratios are medians of the ratios round by round."""
  print(
    f"jax {jax.__version__}, {jax.devices()[0].platform}, P={_DEVICES.value}"
    f" M={_MICROBATCHES.value}, residuals={_RESIDUALS.value}, float32"
  )
  head = ("", "user CPU s min/median", "ratio", "wall s min/median", "ratio", "MiB/device")
  row = "{:16} {:>24} {:>7} {:>20} {:>7} {:>11}"
  print(row.format(*head))
  base = next(iter(times.values()))
  for name, rounds in times.items():
    cells = []
    for i in (0, 1):
      mine = [r[i] for r in rounds]
      ratio = statistics.median(m / b[i] for m, b in zip(mine, base, strict=True))
      cells += [f"{min(mine):.3f} / {statistics.median(mine):.3f}", f"{ratio:.2f}"]
    print(row.format(name, *cells, f"{memory[name]:.1f}"))


if __name__ == "__main__":
  app.run(main)
