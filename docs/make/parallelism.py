"""Writes docs/parallelism.md: what a step computes and sends on every mesh of eight devices.

    .venv/bin/python docs/make/parallelism.py [MESH ...]

Compiles one training step of a small transformer for every stage x data x tensor mesh of eight
devices, and counts FLOPs and bytes in the compiled program, beside what papers' formulas say
(`jaxpipe.parallel.formulas`). Given meshes, such as stage:4,data:2, it prints their rows and writes
nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.sharding import NamedSharding

import jaxpipe
from jaxpipe.models.transformer.config import TransformerConfig, flops_per_token
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.parallel import formulas
from jaxpipe.parallel.placing import shardings
from jaxpipe.pipeline.compiled.hlo import module_of
from jaxpipe.pipeline.compiled.matmuls import flops_of_actions, flops_of_step
from jaxpipe.pipeline.compiled.traffic import Traffic, traffic

PAGE = pathlib.Path(__file__).parents[1] / "parallelism.md"
DEVICES, M, ROWS, LENGTH = 8, 8, 64, 32
MODEL = TransformerConfig(
  vocabulary_size=256, layers=8, width=64, heads=8, kv_heads=8, mlp="gelu", mlp_width=256
)
ITEM = 4  # bytes of a float32
Rows = list[tuple[str, ...]]

TEXT = """# What a step computes and sends on every mesh

Counted in compiled programs: one training step of a transformer of {layers} layers, width {width},
{ROWS} rows of {LENGTH} tokens, 1F1B with M={M}, float32, `residuals="all"`, `unroll="ends"`, on
eight forced host devices, jax {jax}. Written by `.venv/bin/python docs/make/parallelism.py`.

## FLOPs of a device

FLOPs of matrix products, in millions, of the device that has the most: what one run of each
action multiplies, times the number of such actions that the schedule gives the device. *Ideal* is
the model's own count (PaLM, arXiv 2204.02311, appendix B) divided by the devices that share the
work: all of them for the layers, those of the last stage for the head.

{flops}

## Bytes that a device sends

In kB a step, of the device that sends the most, beside the formula. A collective is counted as a
ring. b, s and h are rows, positions and width of a microbatch.

- *activations*: b s h for each boundary, microbatch and direction (Narayanan et al., arXiv
  2104.04473);
- *in layers*: four all-reduces of b s h over `tensor` for each layer and microbatch (Megatron-LM,
  arXiv 1909.08053);
- *gradients*: once a step in float32, an all-reduce of each parameter's piece over the axes that do
  not cut it; the loss is summed with them.

{bytes}

## What a layer keeps

Elements that F keeps of one layer and microbatch for its backward, over b s h, for t devices
along `tensor`: by residual policy, without and with positions cut over `tensor`
(`positions_cut`). Without, every device keeps one part whole and a t-th of the other; with, a
t-th of all or nearly all of it, as Korthikanti et al. (arXiv 2205.05198) count for GPT's layer
(10 + 24/t against 34/t bytes). `selective` leaves out values of the size of attention's scores;
`dots` keeps products with weights, and computes norms and activation functions again.

{kept}

## One mesh in full

{example}, by action:

```
{table}
```
"""


@dataclasses.dataclass(frozen=True)
class Seen:
  """What one compiled step computes and sends.

  Attributes:
    mesh: axis -> number of devices along it.
    layers: FLOPs of matrix products in layers, on the device that has the most.
    head: the same of the head.
    sent: the collectives of the step, with bytes and the actions they belong to.
    gradients: bytes that a device sends to sum gradients, by formula.
  """

  mesh: dict[str, int]
  layers: int
  head: int
  sent: Traffic
  gradients: float


def meshes() -> Iterator[str]:
  """Yields every stage x data x tensor mesh of `DEVICES` devices, as `make_mesh` reads it."""
  sizes = [n for n in range(1, DEVICES + 1) if DEVICES % n == 0]
  for stage in reversed(sizes):
    for data in reversed(sizes):
      if DEVICES % (stage * data) == 0:
        yield f"stage:{stage},data:{data},tensor:{DEVICES // (stage * data)}"


def measure(text: str) -> Seen:
  """Compiles a step for a mesh, and reads the compiled program."""
  mesh, stack = jaxpipe.make_mesh(text), transformer(MODEL)
  schedule = jaxpipe.make_schedule("1f1b", devices=mesh.shape["stage"], microbatches=M)
  tokens = np.zeros((ROWS, LENGTH), np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, residuals="all", unroll="ends")
  program = module_of(jax.jit(step).lower(params, batch).compile())
  actions = flops_of_actions(program)
  ends = {path: flops for path, flops in actions.items() if path and path[-1] == "last_stage"}
  stages = {path: flops for path, flops in actions.items() if path and path[-1] in "FBIWR"}
  shapes = stack.param_shapes()
  summed = jax.tree.map(sum_bytes, shardings(shapes, stack, schedule, mesh), shapes)
  return Seen(
    mesh=dict(mesh.shape),
    layers=max(flops_of_step(stages, schedule)),
    head=max(flops_of_step(ends, schedule), default=0),
    sent=traffic(program, mesh, schedule),
    gradients=sum(jax.tree.leaves(summed)),
  )


def sum_bytes(place: NamedSharding, leaf: Any) -> float:
  """Returns the bytes that a device sends to sum its piece of one parameter's gradient."""
  piece = math.prod(place.shard_shape(leaf.shape))
  return formulas.data(piece, place.mesh.size * piece // math.prod(leaf.shape))


def flops_row(seen: Seen) -> tuple[str, ...]:
  """Returns cells of the first table: counted, ideal and ratio, of the layers, then of the head."""
  P, shards = seen.mesh["stage"], math.prod(seen.mesh.values()) // seen.mesh["stage"]
  head = 6 * MODEL.vocabulary_size * MODEL.width
  tokens = ROWS * LENGTH
  layers = (flops_per_token(MODEL, LENGTH) - head) * tokens / (P * shards)
  return (*_against(seen.layers, layers, 1e6), *_against(seen.head, head * tokens / shards, 1e6))


def bytes_rows(seen: Seen) -> Iterator[tuple[str, ...]]:
  """Yields rows of the second table: what is sent, counted, by formula, and their ratio."""
  P, d, t = (seen.mesh[axis] for axis in ("stage", "data", "tensor"))
  shape = (ROWS // M // d, LENGTH, MODEL.width)
  hops = max((s > 0) + (s < P - 1) for s in range(P)) * M
  each = MODEL.layers // P
  by_formula = {
    "activations": hops * formulas.hop(*shape, ITEM),
    "in layers": each * M * formulas.tensor(*shape, t, ITEM),
    "gradients": seen.gradients,
  }
  for what, expected in by_formula.items():
    mine = Traffic(tuple(row for row in seen.sent.rows if _what(row) == what))
    found = max(mine.bytes(), default=0.0)
    if found or expected:
      yield (what, *_against(found, expected, 1e3))


def _what(row: Any) -> str:
  """Returns the formula's name to which a row of the traffic belongs."""
  if row.path:
    return "in layers" if row.path[-1] in "FBIWR" else "at the ends"
  return "activations" if row.kind == "collective-permute" else "gradients"


def _against(found: float, expected: float, unit: float) -> tuple[str, str, str]:
  ratio = f"{found / expected:.2f}" if expected else "-"
  return f"{found / unit:,.2f}", f"{expected / unit:,.2f}", ratio


def tables(seen: dict[str, Seen]) -> tuple[str, str]:
  """Returns the tables of FLOPs and of bytes."""
  flops: Rows = [("mesh", *("layers", "ideal", "ratio"), *("head", "ideal", "ratio"))]
  flops += [(name, *flops_row(one)) for name, one in seen.items()]
  sent: Rows = [("mesh", "what", "program", "formula", "ratio")]
  sent += [(name, *row) for name, one in seen.items() for row in bytes_rows(one)]
  return _table(flops), _table(sent)


def _table(rows: Rows) -> str:
  lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
  return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def kept_table() -> str:
  """Returns the table of elements that F keeps, over b s h, by policy, t and `positions_cut`."""
  rows: Rows = [("residuals", "positions cut", "t = 1", "t = 2", "t = 4", "as")]
  tokens = np.zeros((8, LENGTH), np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
  schedule = jaxpipe.make_schedule("1f1b", devices=1, microbatches=1)
  for residuals in ("all", "selective", "dots"):
    for cut in (False, True):
      model = dataclasses.replace(MODEL, layers=1, positions_cut=cut)
      found = []
      for t in (1, 2, 4):
        mesh = jaxpipe.make_mesh(f"stage:1,tensor:{t}")
        known = jaxpipe.memory_report(
          transformer(model), schedule, mesh, batch, residuals=residuals
        )
        found.append(known.unit / (ITEM * tokens.size * MODEL.width))
      # Through the first two; the third must lie on it.
      over_t = 2 * (found[0] - found[1])
      whole = found[0] - over_t
      fits = abs(whole + over_t / 4 - found[2]) < 1e-9
      formula = f"{whole:.2f} + {over_t:.2f}/t" if fits else "-"
      rows.append((residuals, "yes" if cut else "no", *(f"{n:.2f}" for n in found), formula))
  return _table(rows)


def main() -> None:
  """Compiles all meshes and writes the page; of meshes that are given prints the rows alone."""
  chosen = sys.argv[1:] or list(meshes())
  seen = {name: measure(name) for name in chosen}
  flops, sent = tables(seen)
  example = max(seen, key=lambda name: min(seen[name].mesh[a] for a in ("stage", "data", "tensor")))
  if sys.argv[1:]:
    print(flops, sent, *(f"{name}\n{one.sent}" for name, one in seen.items()), sep="\n\n")
    return
  PAGE.write_text(
    TEXT.format(
      **dict(layers=MODEL.layers, width=MODEL.width, ROWS=ROWS, LENGTH=LENGTH, M=M),
      **dict(jax=jax.__version__, flops=flops, bytes=sent, kept=kept_table()),
      **dict(example=example, table=seen[example].sent),
    )
  )


if __name__ == "__main__":
  main()
