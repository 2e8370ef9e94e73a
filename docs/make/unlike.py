"""Writes a section of docs/partition.md: what it costs that layers are not alike.

    .venv/bin/python docs/make/unlike.py

Bytes held and needed by every experiment whose layers are not alike, partitions of AmoebaNet, and
its CPU seconds beside those of one device. Some minutes on two cores.
"""

from __future__ import annotations

import os
import pathlib
import resource
import statistics
import sys
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np
from section import write_section

import jaxpipe
from experiments import diffusion, gnn, image_amoebanet, segment, speech, translate
from jaxpipe.models.vision.amoebanet import amoebanet
from jaxpipe.models.vision.amoebanet_cells import AmoebaNetConfig
from jaxpipe.models.vision.pictures import CONVOLUTIONS
from jaxpipe.schedules.partition import best
from jaxpipe.stack.stack import LayerStack

P, M, ROUNDS = 4, 8, 9
EXPERIMENTS = (image_amoebanet, segment, translate, diffusion, gnn, speech)
SIZES = (3, 6, 12)  # normal cells of AmoebaNet
TIMED = 3
KIB = 2**10
Tree = Any


class Packing(NamedTuple):
  """What a network over P devices holds because its stages are packed.

  Attributes:
    name: the experiment's.
    sizes: layers of each stage, [P].
    report: bytes held and needed, by kind and device.
    error: the memory report over the compiler's bytes, minus 1.
  """

  name: str
  sizes: tuple[int, ...]
  report: jaxpipe.PackingReport
  error: float


def packing(module: Any) -> Packing:
  """Measures an experiment at its defaults, cut over P devices by counted FLOPs."""
  task = module.build(module.DEFAULTS)
  batch = task.batches(0)
  schedule = jaxpipe.make_schedule("1f1b", devices=P, microbatches=M if module is not gnn else 4)
  mesh = jaxpipe.make_mesh(f"stage:{P}")
  stack, found = jaxpipe.partitioned(task.stack, schedule, batch)
  report = jaxpipe.packing_report(stack, schedule, mesh, batch)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)
  compiled = jax.jit(step).lower(*arguments(stack, batch, schedule, mesh)).compile()
  error = jaxpipe.memory_report(stack, schedule, mesh, batch).error(compiled)
  name = module.__name__.rpartition(".")[2]
  print(name, found.sizes, f"{error:+.1%}", report, sep="\n", flush=True)
  return Packing(name, found.sizes, report, error)


def arguments(stack: LayerStack, batch: Tree, *where: Any) -> tuple[Any, ...]:
  """Returns the arguments of a step, placed for a schedule and mesh where those are given."""
  key = jax.random.key(0)
  state = (stack.init_state(key, batch, *where),) if stack.has_state else ()
  return stack.init(key, batch, *where), batch, key, *state


def network(cells: int) -> tuple[LayerStack, Tree]:
  """Returns AmoebaNet-D (cells, 16) and a batch of 128 pictures of 8x8."""
  config = AmoebaNetConfig(
    layers=cells,
    filters=16,
    classes=10,
    image_channels=1,
    stem_cells=0,
    convolution=CONVOLUTIONS["matmul"],
  )
  rng = np.random.default_rng(0)
  image, label = rng.normal(size=(128, 8, 8, 1)), rng.integers(0, 10, 128)
  batch = {"image": image.astype(np.float32), "label": label.astype(np.int32)}
  return amoebanet(config), {**batch, "weights": np.ones(128, np.float32)}


def partition(cells: int) -> str:
  """Returns a row of the table: the best partition of AmoebaNet-D (cells, 16)."""
  stack, batch = network(cells)
  schedule = jaxpipe.make_schedule("1f1b", devices=P, microbatches=M)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((128 // M, *leaf.shape[1:]), leaf.dtype), batch
  )
  plan = best(jaxpipe.layer_costs(stack, shapes), schedule)
  cut, _ = jaxpipe.partitioned(stack, schedule, batch, plan.partition.sizes)
  report = jaxpipe.packing_report(cut, schedule, jaxpipe.make_mesh(f"stage:{P}"), batch)
  count = sum(leaf.size for leaf in jax.tree.leaves(stack.param_shapes()))
  print(cells, plan.report(), report, sep="\n", flush=True)
  return (
    f"| ({cells}, 16) | {stack.depth} | {count:,} | {show(plan.partition.sizes)} |"
    f" {plan.gain:.1%} | {'yes' if plan.proven else f'within {plan.gap:.1%}'} |"
    f" {plan.partition.imbalance:.2f} |"
    f" {report.ratio:.2f} |"
  )


def show(sizes: tuple[int, ...]) -> str:
  """Returns the numbers of layers of the stages as the tables show them."""
  return ", ".join(map(str, sizes))


def seconds() -> dict[str, list[float]]:
  """Measures user CPU seconds of a step of AmoebaNet: way of computing it -> each round's."""
  stack, batch = network(TIMED)
  schedule = jaxpipe.make_schedule("1f1b", devices=P, microbatches=M)
  mesh = jaxpipe.make_mesh(f"stage:{P}")
  stack, _ = jaxpipe.partitioned(stack, schedule, batch)
  here, there = arguments(stack, batch), arguments(stack, batch, schedule, mesh)
  ways = {
    "pipeline": (jaxpipe.pipeline_value_and_grad(stack, schedule, mesh), there),
    "one, all kept": (jaxpipe.reference_value_and_grad(stack, M), here),
    "one, inputs kept": (jaxpipe.reference_value_and_grad(stack, M, residuals="full"), here),
  }
  found: dict[str, list[float]] = {name: [] for name in ways}
  for step, args in ways.values():
    jax.block_until_ready(step(*args))
  print("compiled", flush=True)
  for _ in range(ROUNDS):
    for name, (step, args) in ways.items():
      before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
      jax.block_until_ready(step(*args))
      found[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - before)
  print({name: (min(each), statistics.median(each)) for name, each in found.items()}, flush=True)
  return found


def time_row(found: dict[str, list[float]], name: str) -> str:
  """Returns the last cells of a way's row: its seconds, and the pipeline's over them."""
  each = found[name]
  ratios = [a / b for a, b in zip(found["pipeline"], each, strict=True)]
  return (
    f"{statistics.median(each):.3f} (least {min(each):.3f}) | {statistics.median(ratios):.2f} |"
    f" {min(found['pipeline']) / min(each):.2f} |"
  )


def main() -> None:
  """Measures, and writes the section."""
  times = seconds()
  cuts = [partition(cells) for cells in SIZES]
  packings = [packing(module) for module in EXPERIMENTS]
  write_section("partition.md", "unlike.py", section(times, cuts, packings))


def waste(one: Packing) -> str:
  """Returns a network's row of the table of kinds."""
  kinds = " | ".join(f"{one.report.waste[kind]:.2f}" for kind in one.report.held)
  held = sum(one.report.held.values()) / KIB
  return (
    f"| `{one.name}.py` | {show(one.sizes)} | {held:,.0f} | {one.report.ratio:.2f} | {kinds} |"
    f" {one.error:+.1%} |"
  )


def section(times: dict[str, list[float]], cuts: list[str], packings: list[Packing]) -> str:
  """Returns the section: the text around its three tables."""
  kinds = list(packings[0].report.held)
  rows = "\n".join(map(waste, packings))
  lines = "\n".join(cuts)
  return f"""## Layers that are not alike

Stages that are not alike run as one program: each device switches to its own stage's function,
and what stages hold and send lies in arrays of one shape, padded to the largest stage. That costs
bytes, and the program has the code of all stages. Written by `.venv/bin/python
docs/make/unlike.py` on two x86 cores, jax {jax.__version__}; P={P}, 1F1B, M={M}, only a stage's
input kept (the default).

### Bytes

The six experiments whose stages are unlike, each at its own sizes (`gnn.py` with M=4), divided by
the simulated step at counted FLOPs. *Over the fullest*: what a device holds over what the device
that needs most would need for its own stages, unpacked. By kind: what all devices hold over what
all need. *Report*: `jaxpipe.memory_report` over the compiler's arguments, results and temporaries,
minus 1.

| experiment | layers of the stages | KiB held | over the fullest | {" | ".join(kinds)} | report |
|---|---|---|---|{"---|" * len(kinds)}---|
{rows}

AmoebaNet's:

```
{packings[0].report}
```

### Partitions of AmoebaNet-D

128 pictures of 8x8. *Saved*: share of the simulated step of an even partition.

| (L, D) | layers | parameters | stages | saved | proven best | largest / mean | held, as above |
|---|---|---|---|---|---|---|---|
{lines}

### CPU seconds

User CPU seconds of a step of AmoebaNet-D ({TIMED}, 16), {ROUNDS} interleaved rounds in one
process. The pipeline computes each stage's forward twice, as GPipe does.

| | seconds, median | pipeline's over these | least over least |
|---|---|---|---|
| pipeline | {statistics.median(times["pipeline"]):.3f} (least {min(times["pipeline"]):.3f}) | | |
| `jax.grad` on one device, nothing computed twice | {time_row(times, "one, all kept")}
| the same, layer inputs kept alone | {time_row(times, "one, inputs kept")}
"""


if __name__ == "__main__":
  main()
