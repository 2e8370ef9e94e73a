"""Writes a section of docs/speed.md and its picture: size and compile time as M grows.

    .venv/bin/python docs/make/program_size.py

Program size is the number of instructions of the optimized program; compile time is wall time.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import matplotlib.pyplot as plt
import numpy as np
from section import DOCS, write_section

import jaxpipe
from jaxpipe.models.transformer.decoder import TransformerConfig, transformer

P, MICROBATCHES = 4, (8, 16, 32, 64, 128, 256)
SCHEDULES, SHAPES = ("gpipe", "1f1b", "zb-h1"), ("none", "ends")


def measure(name: str, shape: str, M: int) -> tuple[int, float]:
  """Returns the optimized step's number of instructions, and the seconds to compile it."""
  model = TransformerConfig(vocabulary_size=64, layers=8, width=32, heads=2, kv_heads=2)
  stack, mesh = transformer(model), jaxpipe.make_mesh(f"stage:{P}")
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=M)
  tokens = np.zeros((M, 16), np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((M, 16), np.float32)}
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  step = jax.jit(jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll=shape))
  lowered = step.lower(params, batch)
  begin = time.perf_counter()
  text = lowered.compile().as_text()
  return text.count(" = "), time.perf_counter() - begin


def main() -> None:
  """Measures all, draws, and writes the section."""
  measure("gpipe", "none", 2)  # what the first compilation of a process pays once
  seen = {
    (name, shape): [measure(name, shape, M) for M in MICROBATCHES]
    for name in SCHEDULES
    for shape in SHAPES
  }
  draw(seen)
  write_section("speed.md", "program_size.py", section(seen))


def draw(seen: dict[tuple[str, str], list[tuple[int, float]]]) -> None:
  """Draws both figures over M, from (schedule, shape) -> what `measure` returned for each M."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
  for (name, shape), values in seen.items():
    style = dict(marker="o", markersize=3, linestyle="-" if shape == "none" else "--")
    left.plot(MICROBATCHES, [size for size, _ in values], label=f"{name}, {shape}", **style)
    right.plot(MICROBATCHES, [seconds for _, seconds in values], **style)
  for axis, what in ((left, "instructions"), (right, "compile time in seconds")):
    axis.set(xscale="log", ylim=(0, None), xlabel="microbatches M", title=what)
    axis.set_xticks(MICROBATCHES, [str(M) for M in MICROBATCHES])
  figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
  figure.savefig(DOCS / "images" / "program-size.png", dpi=130)


def section(seen: dict[tuple[str, str], list[tuple[int, float]]]) -> str:
  """Returns the section from (schedule, shape) -> what `measure` returned for each M."""
  head = " | ".join(f"M={M}" for M in MICROBATCHES)
  rows = "\n".join(
    f"| {name} | `{shape}` | " + " | ".join(f"{size:,}, {s:.1f} s" for size, s in values) + " |"
    for (name, shape), values in seen.items()
  )
  return f"""## Program size and compile time

The loop of a step does not know M: its table does. Instructions of the optimized program and
seconds to compile it, P={P}, 8 small layers, jax {jax.__version__} on CPU, by
`.venv/bin/python docs/make/program_size.py`; `none` is one loop over all ticks, `ends` has warm-up
and drain straight ([why](decisions/0008-three-program-shapes.md)).

![instructions and compile time over M](images/program-size.png)

| schedule | shape | {head} |
|---|---|{"---|" * len(MICROBATCHES)}
{rows}
"""


if __name__ == "__main__":
  main()
