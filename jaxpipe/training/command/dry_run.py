"""The text that `--dry_run` prints: what a run would cost, found without running it.

The step is compiled, from shapes, and its program is read: nothing is trained, and nothing written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax

from jaxpipe.parallel.rules import describe as name_of
from jaxpipe.pipeline.compiled.traffic import Traffic, traffic
from jaxpipe.training.aot.aot import placed_shapes
from jaxpipe.training.loop.report import describe
from jaxpipe.training.loop.step import compile_step
from jaxpipe.training.plan.run import Run


def dry_run(run: Run) -> str:
  """Describes a run: mesh, timetable, memory by kind, every parameter's place, and all traffic.

  Args:
    run: built, not begun.

  Returns:
    Several lines, for a terminal or a file.
  """
  sent = count_traffic(run)
  by_axis = [
    f"  {','.join(axes):24} {kind:20} {size / 1e6:14,.3f} MB"
    for (axes, kind), size in sent.sums().items()
  ]
  return "\n".join(
    (
      describe(run),
      "parameters by place (shape whole -> on a device, bytes there):",
      *place_lines(run),
      "sent in a step by the device that sends most:",
      *(by_axis or ["  nothing"]),
      "the same by action:",
      *(f"  {line}" for line in str(sent).splitlines()),
      "dry run: nothing was trained, and nothing written",
    )
  )


def place_lines(run: Run) -> Iterator[str]:
  """Yields a line for every parameter, and for what is not trained: its shapes and mesh axes."""
  placed = placed_shapes(run.state_shapes(), run.stack, run.schedule, run.mesh)
  leaves = jax.tree.leaves_with_path(placed.params)
  leaves += jax.tree.leaves_with_path({"not trained": placed.model_state})
  width = max(len(name_of(path)) for path, _ in leaves)
  for path, leaf in leaves:
    here = leaf.sharding.shard_shape(leaf.shape)
    axes = ", ".join(map(_entry, leaf.sharding.spec)) or "replicated"
    size = math.prod(here) * leaf.dtype.itemsize
    yield (
      f"  {name_of(path):{width}}  {_shape(leaf.shape):>20} -> {_shape(here):<20} {size:>14,} B"
      f"  ({axes})"
    )


def count_traffic(run: Run) -> Traffic:
  """Compiles the step, from shapes, and counts the bytes that devices send each other in it."""
  placed = placed_shapes(run.state_shapes(), run.stack, run.schedule, run.mesh)
  return traffic(compile_step(run, placed), run.mesh, run.schedule)


def _entry(entry: Any) -> str:
  """Formats one dim of a `PartitionSpec`: an axis, axes joined by `*`, or `-` for none."""
  if entry is None:
    return "-"
  return entry if isinstance(entry, str) else "*".join(entry)


def _shape(shape: tuple[int, ...]) -> str:
  return "[" + ", ".join(map(str, shape)) + "]"
