"""Defines `Task`, which an experiment provides: a stack, its batches and how to judge the result.

A script gives its configuration and a function that builds the `Task`; `run_task` does the rest:

    run_task(DigitsConfig(run_dir="runs/digits"), lambda config: Task(stack=..., batches=..., ...))

Language models are not tasks: they have a run of their own in `training/lm/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.flags.run_config import RunConfig
from jaxpipe.training.flags.settings import free

Tree = Any
Batch = Any  # a pytree of NumPy arrays, leaves [B, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(RunConfig):
  """The flags of an experiment; a subclass adds its own by `same` and `free` of `settings.py`.

  Each field is a flag, and its help text says what it means.
  """

  partition: str = free(
    "",
    "layers of each stage, such as 3,2,4; or best (shortest simulated step), balanced, variance,"
    " parameters, uniform or type:REGEX; default: as many in each as can be",
  )


def sum_of_weights(batch: Batch) -> float:
  """Adds up the weights of a batch, for a head that takes them from `batch["weights"]`."""
  return float(np.sum(batch["weights"], dtype=np.float64))


def no_summary(loss: float, metrics: Tree, weight: float) -> Mapping[str, float]:
  """Summarizes nothing: the loss is all that is reported."""
  return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
  """A known result to compare a trained model with, such as that of a constant answer.

  Attributes:
    name: what reaches the result, such as `the most frequent class`.
    metrics: its figures, by the names that `Task.summarize` uses, or `loss`.
  """

  name: str
  metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
  """An experiment: the model, its data, and how the result is reported.

  Attributes:
    stack: the model that is trained.
    batches: `step -> batch`, leaves [B, ...]; a function of the step (and of the configuration's
      seed) alone, so that a resumed run sees what it would have seen. Shapes and dtypes are those
      of `batches(0)` at every step.
    validation: held-out batches of the same shapes; every validation goes through all of them. The
      last is filled up with rows of weight 0.
    weigh: `batch -> weight`, what the head's weights add up to over a whole validation batch.
    summarize: `(mean loss, summed metrics, summed weight) -> numbers` over all validation batches,
      such as `{"accuracy": metrics["correct"] / weight}`; they go to `metrics.jsonl` as
      `validation_accuracy`.
    baseline: a known result, printed beside the model's; None for none.
    finish: `(params, state) -> text` to print after the last step, such as a sample; it is given
      canonical parameters on one device, and the stack's model state (`{}` if it has none). None
      where there is nothing to add.
    identity: JSON values that mark the data, such as a checksum; a resumed run must have the same.
    data_line: a line about the data for the start of the run; empty for none.
  """

  stack: LayerStack
  batches: Callable[[int], Batch]
  validation: Iterable[Batch]
  weigh: Callable[[Batch], float] = sum_of_weights
  summarize: Callable[[float, Tree, float], Mapping[str, float]] = no_summary
  baseline: Baseline | None = None
  finish: Callable[[Tree, Tree], str] | None = None
  identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  data_line: str = ""
