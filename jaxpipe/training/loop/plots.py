"""Draws the loss curve of a run from its metrics file."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from jaxpipe.data.files import atomic_file
from jaxpipe.training.loop.metrics import read_records

_REACH = 25  # steps to each side in the mean that is drawn over the losses of single steps


def draw_loss(
  metrics: pathlib.Path, png: pathlib.Path, unit: str = "", validation_unit: str = ""
) -> None:
  """Draws training and validation loss over steps.

  Args:
    metrics: `metrics.jsonl`; nothing is drawn if it has no lines.
    png: the file to make or replace.
    unit, validation_unit: of the losses; left out where empty.
  """
  # Imported here: drawing is the last thing of a run, and matplotlib the slowest import.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  records = list(read_records(metrics))
  if not records:
    return
  steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
  points = [(r["step"], r["validation_loss"]) for r in records if r["validation_loss"] is not None]
  figure = Figure(figsize=(8, 4.5), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.plot(steps, losses, color="0.8", lw=0.8, label=_label("training, single steps", unit))
  axes.plot(steps, running_mean(losses), color="tab:blue", label="training, running mean")
  if points:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color="tab:orange", marker="o", label=_label("validation", validation_unit))
  axes.set_xlabel("step")
  axes.set_ylabel("loss")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  with atomic_file(png) as file:
    figure.savefig(file, dpi=120, format="png")


def _label(name: str, unit: str) -> str:
  return f"{name} ({unit})" if unit else name


def running_mean(values: Sequence[float]) -> np.ndarray:
  """Averages over a window centred on each value; at both ends the window is narrower.

  A mean of past values alone would trail behind where the loss falls fast.

  Args:
    values: n numbers.

  Returns:
    float64 [n].
  """
  sums = np.concatenate([[0.0], np.cumsum(values)])
  at = np.arange(len(values))
  reach = np.minimum(_REACH, np.minimum(at, len(values) - 1 - at))
  return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
