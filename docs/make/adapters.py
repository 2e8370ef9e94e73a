"""Writes a section of docs/memory.md: training adapters beside training all, in one run.

    .venv/bin/python docs/make/adapters.py

A model of Qwen3-0.6B's shape with fewer layers and a smaller vocabulary, over four CPU devices.
Steps of both are taken in turn. About five minutes on two cores, and 10 GB of memory.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from section import write_section

import jaxpipe
from jaxpipe.models.transformer.adapters import Lora
from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.models.transformer.presets import find_preset
from jaxpipe.training.loop.step import make_train_step
from jaxpipe.training.plan.state import create_state

P, M, ROWS, T, ROUNDS = 4, 8, 8, 64, 3
LAYERS, VOCABULARY, RANK = 8, 16_384, 16
MIB = 2**20


class Seen(NamedTuple):
  """One way to train, compiled.

  Attributes:
    name: of the way.
    trained: parameters that train.
    report: predicted memory of a device.
    memory: the compiler's analysis of the whole step.
    lines: of the compiled program.
    step: the compiled step, which donates the state.
    state: what the next step begins from, a list of one.
    seconds: of each step, wall time and CPU time.
  """

  name: str
  trained: int
  report: jaxpipe.MemoryReport
  memory: Any
  lines: int
  step: Any
  state: list[Any]
  seconds: list[tuple[float, float]]


def prepare(name: str, config: TransformerConfig, batch: Any) -> Seen:
  """Builds and compiles one way to train, with fresh values."""
  stack, mesh = transformer(config), jaxpipe.make_mesh(f"stage:{P}")
  assert stack.uniform
  schedule = jaxpipe.make_schedule("1f1b", devices=P, microbatches=M)
  run = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll="none")
  tx = optax.adamw(1e-4)
  state = create_state(stack, tx, 0, batch, schedule, mesh)
  step = make_train_step(run, tx, optax.constant_schedule(1e-4), 0, state, mesh)
  compiled = step.lower(state, batch).compile()
  return Seen(
    name,
    sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    jaxpipe.memory_report(stack, schedule, mesh, batch, optimizer=tx),
    compiled.memory_analysis(),
    compiled.as_text().count("\n"),
    compiled,
    [state],
    [],
  )


def once(seen: Seen, batch: Any) -> None:
  """Takes a step, and notes its times."""
  wall, cpu = time.perf_counter(), time.process_time()
  state, result = seen.step(seen.state.pop(), batch)
  jax.block_until_ready((state, result))
  seen.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
  seen.state.append(state)


def main() -> None:
  """Measures both in turn, and writes the section."""
  shape = find_preset("qwen3-0.6b")
  shape = dataclasses.replace(shape, layers=LAYERS, vocabulary_size=VOCABULARY)
  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, T), np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
  lora = dataclasses.replace(shape, lora=Lora(RANK, 2.0 * RANK))
  ways = [prepare("all parameters", shape, batch), prepare(f"adapters, rank {RANK}", lora, batch)]
  for seen in ways:
    once(seen, batch)  # warms up
    seen.seconds.clear()
  for _ in range(ROUNDS):
    for seen in ways:
      once(seen, batch)
  write_section("memory.md", "adapters.py", section(ways))


def section(ways: list[Seen]) -> str:
  """Returns the section of what was seen."""
  kinds = ("parameters", "state", "optimizer", "gradients", "saved")
  rows = "\n".join(
    f"| {seen.name} | {seen.trained:,} |"
    f" {' | '.join(f'{seen.report.bytes.get(kind, 0) / MIB:,.1f}' for kind in kinds)} |"
    f" {_compiled(seen):,.0f} | {seen.lines:,} | {_times(seen, 0)} | {_times(seen, 1)} |"
    for seen in ways
  )
  full, few = ways
  wall = statistics.median(b / a for (a, _), (b, _) in zip(full.seconds, few.seconds, strict=True))
  return f"""## Adapters beside all parameters

Qwen3-0.6B's shape with {LAYERS} layers and {VOCABULARY:,} tokens, its table tied, 1F1B on P={P},
M={M}, {ROWS} rows of {T} tokens, float32, AdamW, one loop over all ticks, jax {jax.__version__} on
CPU. MiB of one device, predicted by kind and compiled (arguments and temporaries); a step's
seconds are median and least of {ROUNDS}, taken in turn.

| what trains | how many | {" | ".join(kinds)} | compiled | lines of the program | wall | CPU |
|---|---|{"---|" * len(kinds)}---|---|---|---|
{rows}

Adapters take {wall:.2f} of the time (median of the pairs) and
{_compiled(few) / _compiled(full):.2f} of the memory. What is frozen has no weight gradient: of the
three products of a matrix one is left out. Under `dots` both results that are added, the matrix's
and the adapter's, are kept for the backward.

Written by `.venv/bin/python docs/make/adapters.py`."""


def _compiled(seen: Seen) -> float:
  """MiB of arguments and temporaries; results lie where donated arguments did."""
  return (seen.memory.argument_size_in_bytes + seen.memory.temp_size_in_bytes) / MIB


def _times(seen: Seen, which: int) -> str:
  """Median and least of the times of one kind."""
  times = [pair[which] for pair in seen.seconds]
  return f"{statistics.median(times):.2f}, {min(times):.2f}"


if __name__ == "__main__":
  main()
