"""Writes a section of docs/memory.md and its picture: what a step holds, predicted and compiled.

    .venv/bin/python docs/make/memory.py

Compiles a step of every registered schedule for three numbers of microbatches and three residual
policies.
"""

from __future__ import annotations

import os
from typing import NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import matplotlib.pyplot as plt
import numpy as np
from section import DOCS, write_section

import jaxpipe
from jaxpipe.models.transformer.decoder import TransformerConfig, transformer
from jaxpipe.schedules import schedule_names

P, MICROBATCHES, POLICIES = 4, (8, 16, 32), ("dots", "all", "full")
MIB = 2**20


class Seen(NamedTuple):
  """What one step holds, by the report before compiling and by the compiler.

  Attributes:
    rings: MiB of rings and pools that the report predicts.
    temporary: MiB of temporaries that the compiled step allocates.
    error: the whole report over the compiler's arguments, results and temporaries, minus 1.
    report: the report itself.
  """

  rings: float
  temporary: float
  error: float
  report: jaxpipe.MemoryReport


def measure(name: str, M: int, residuals: str) -> Seen:
  """Compiles a step of a schedule under a residual policy, beside what is predicted of it."""
  model = TransformerConfig(vocabulary_size=64, layers=16, width=64, heads=4, kv_heads=4)
  stack, mesh = transformer(model), jaxpipe.make_mesh(f"stage:{P}")
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=M)
  tokens = np.zeros((2 * M, 64), np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  # One shape for all: what ticks outside the loop take is no ring's.
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, residuals=residuals, unroll="none")
  compiled = jax.jit(step).lower(params, batch).compile()
  report = jaxpipe.memory_report(stack, schedule, mesh, batch, residuals=residuals)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return Seen(report.rings / MIB, temporary / MIB, report.error(compiled), report)


def main() -> None:
  """Measures all, draws, and writes the section."""
  seen = {
    (name, policy): [measure(name, M, policy) for M in MICROBATCHES]
    for policy in POLICIES
    for name in schedule_names()
  }
  draw(seen)
  write_section("memory.md", "memory.py", section(seen))


def section(seen: dict[tuple[str, str], list[Seen]]) -> str:
  """Returns the section from (schedule, policy) -> what was seen for each of `MICROBATCHES`."""
  head = " | ".join(f"M={M}" for M in MICROBATCHES)
  tables = "\n\n".join(
    f"`{policy}`:\n\n| schedule | {head} | whole report over compiler |\n"
    f"|---|{'---|' * len(MICROBATCHES)}---|\n"
    + "\n".join(row(name, seen[name, policy]) for name in schedule_names())
    for policy in POLICIES
  )
  units = "\n".join(
    f"| `{policy}` | {-seen['1f1b', policy][0].report.units[2]:.2f} | "
    f"{seen['zb-h1', policy][1].rings / seen['1f1b', policy][1].rings:.2f} |"
    for policy in POLICIES
  )
  example = seen["zb-h1", "dots"][1].report
  worst = max(abs(one.error) for several in seen.values() for one in several)
  return f"""## Predicted and compiled

![rings predicted and temporaries compiled](images/memory.png)

Predicted rings / compiled temporary bytes, in MiB, for a transformer of 16 layers, width 64, rows
of 64 tokens, two rows a microbatch, P={P}, one loop over all ticks, jax {jax.__version__} on CPU,
by `.venv/bin/python docs/make/memory.py`. The difference is what one action needs inside, which
is the same for every M. The last column compares the whole report at M={MICROBATCHES[1]} with the
compiler's arguments, results and temporaries; the worst of all cases here is {worst:.1%}.

{tables}

## What zero bubble costs

Bytes that wait from I to W over bytes that F keeps, and the rings of ZB-H1 over those of 1F1B at
M=16:

| residuals | waits for W | ZB-H1 / 1F1B |
|---|---|---|
{units}

Zero bubble is dear under a policy that keeps little: values that F did not keep must wait from I
to W all the same. Under `all` they take the cells of values that I has consumed, and cost next to
nothing. To plan a schedule within a limit in these units:

```python
units = jaxpipe.memory_report(stack, schedule, mesh, batch).units
jaxpipe.make_schedule("zb-auto", devices=4, microbatches=16, memory=units, memory_limit=6)
```

## A report

What `print(jaxpipe.memory_report(...))` shows for ZB-H1, `dots`, M=16:

```
{example}
```
"""


def row(name: str, several: list[Seen]) -> str:
  """Returns a schedule's row of the table of a policy."""
  cells = " | ".join(f"{one.rings:.2f} / {one.temporary:.2f}" for one in several)
  return f"| {name} | {cells} | {several[1].error:+.1%} |"


def draw(seen: dict[tuple[str, str], list[Seen]]) -> None:
  """Draws the compiler's temporaries as bars, with a mark where the predicted rings end."""
  names = schedule_names()
  figure, axes = plt.subplots(
    1, len(POLICIES), figsize=(11, 4.6), layout="constrained", sharey=True
  )
  for axis, policy in zip(axes, POLICIES, strict=True):
    for i, M in enumerate(MICROBATCHES):
      at = np.arange(len(names)) + 0.27 * (i - 1)
      mine = [seen[name, policy][i] for name in names]
      axis.barh(
        at, [one.temporary for one in mine], 0.25, color=f"C{i}", alpha=0.45, label=f"M={M}"
      )
      axis.plot([one.rings for one in mine], at, "k|", markersize=6)
    axis.set(title=f"residuals={policy}", xlabel="MiB per device")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
  axes[0].plot([], [], "k|", label="rings, predicted")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
  figure.savefig(DOCS / "images" / "memory.png", dpi=130)


if __name__ == "__main__":
  main()
