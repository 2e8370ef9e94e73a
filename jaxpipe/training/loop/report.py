"""The text that a run prints: its plan at the start, then a line for each step.

On a terminal a progress bar stands below the lines; in a file there are lines alone.
"""

from __future__ import annotations

import math
import shutil
import sys
from types import TracebackType
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxpipe.parallel.placing import shardings
from jaxpipe.schedules import draw_text, simulate
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.chips import peak_flops
from jaxpipe.training.loop.metrics import Record
from jaxpipe.training.plan.run import Run
from jaxpipe.training.processes.processes import is_first

Tree = Any


def describe(run: Run) -> str:
  """Describes a run before its first step, in several lines.

  They say which mesh and schedule it has, with the timetable and both bubbles, how many parameters
  there are, what memory is expected on a device, and what the data are.
  """
  # A timetable is broken at a terminal's edge, never in a file.
  width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
  device = run.mesh.devices.flat[0]
  axes = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
  total, held = count_parameters(run)
  memory = run.memory
  parts = ", ".join(
    f"{kind.replace('_', ' ')} {_mib(size)}" for kind, size in memory.bytes.items() if size
  )
  return "\n".join(
    (
      f"mesh: {axes or 'stage 1'} = {run.mesh.size} devices ({device.device_kind})",
      *([f"schedules by estimate:\n{run.choice}"] if run.choice else []),
      draw_text(simulate(run.schedule), width),
      f"parameters: {total:,} in total, {held:,} on each device{_besides(run.stack)}",
      f"expected memory of each device: {_mib(memory.total)} MiB ({parts})",
      *([run.data_line] if run.data_line else []),
    )
  )


def _besides(stack: LayerStack) -> str:
  """How many values the model has besides its parameters, for a model that has some."""
  count = _count(stack.state_shapes()) if stack.has_state else 0
  return f"; {count:,} values are not trained" if count else ""


def count_parameters(run: Run) -> tuple[int, int]:
  """Counts parameters: of the whole model, and of the share that one device holds."""
  # As they are stored: of unlike stages every row is as wide as the widest, padding counted.
  laid = run.stack.laid_out(run.schedule)
  shapes = laid.param_shapes()
  places = shardings(shapes, laid, run.schedule, run.mesh)
  here = jax.tree.map(lambda place, p: math.prod(place.shard_shape(p.shape)), places, shapes)
  return _count(run.stack.param_shapes()), sum(jax.tree.leaves(here))


class StepLine:
  """Formats the record of a step, with the utilisation (MFU) where FLOPs and peak are known.

  Args:
    run: whose steps are reported.
  """

  def __init__(self, run: Run) -> None:
    self._steps = run.config.steps
    self._flops, self._unit = run.flops_per_token, run.validation_unit
    peak = peak_flops(run.mesh.devices.flat[0].device_kind)
    # Of the whole mesh: a device that idles in a bubble counts as much as one that works.
    self._peak = peak and peak * run.mesh.size

  def __call__(self, record: Record) -> str:
    parts = [
      f"step {record.step:>{len(str(self._steps - 1))}}",
      f"loss {record.loss:.4f}",
      f"grad norm {record.grad_norm:.3f}",
      f"lr {record.learning_rate:.2e}",
    ]
    rate = record.tokens_per_second
    if rate is not None:
      parts.append(f"{rate:,.0f} tokens/s")
    parts.append(f"{record.step_seconds * 1e3:.1f} ms")
    if rate is not None and self._peak and self._flops:
      parts.append(f"MFU {rate * self._flops / self._peak:.1%}")
    if record.validation_loss is not None:
      parts.append(f"validation {record.validation_loss:.4f} {self._unit}".rstrip())
    parts += [f"{name.removeprefix('validation_')} {x:.4f}" for name, x in record.more.items()]
    return "  ".join(parts)


class Screen:
  """Prints lines; on a terminal above a progress bar, which the `with` block shows.

  Args:
    start: steps that are done already.
    steps: of the whole run.
  """

  def __init__(self, start: int, steps: int) -> None:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = sys.stdout.isatty() and is_first()
    self._bar = Progress(*columns, console=Console(), disable=not shown)
    self._task = self._bar.add_task("", completed=start, total=steps)

  def line(self, text: str) -> None:
    """Prints one line as it is."""
    if self._bar.disable:
      print(text, flush=True)
    else:
      # Through the bar's console, or the bar would be drawn into the line.
      self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

  def advance(self, done: int) -> None:
    """Moves the bar to `done` steps."""
    self._bar.update(self._task, completed=done)

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._bar.stop()


def _count(tree: Tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _mib(size: int) -> str:
  """Formats bytes as MiB."""
  return f"{size / 2**20:,.1f}"
