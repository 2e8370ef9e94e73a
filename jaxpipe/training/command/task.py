"""An experiment that is not about text: a stack, its batches, and what to say about the result.

A script gives its configuration and a function that builds the `Task`; `run_task` does the rest:

    run_task(DigitsConfig(run_dir="runs/digits"), lambda config: Task(stack=..., batches=..., ...))
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
  """The flags of an experiment; a subclass adds its own by `same` and `free` of `settings.py`."""

  partition: str = free(
    "",
    "layers of each stage, such as 3,2,4; or best (shortest simulated step), balanced, variance,"
    " parameters, uniform or type:REGEX; default: as many in each as can be",
  )


def sum_of_weights(batch: Batch) -> float:
  """What the head's weights of a whole batch add up to, where they are `batch["weights"]`."""
  return float(np.sum(batch["weights"], dtype=np.float64))


def no_summary(loss: float, metrics: Tree, weight: float) -> Mapping[str, float]:
  """Nothing besides the loss."""
  return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
  """A result that needs no training, or somebody else's, to hold one's own against.

  Attributes:
    name: such as `the most frequent class`.
    metrics: by the names that `Task.summarize` uses, or `loss`.
  """

  name: str
  metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
  """What is trained, on what, and how the result is told.

  Attributes:
    stack: the model.
    batches: `step -> batch`, leaves [B, ...]; a function of the step (and of the configuration's
      seed) alone, so that a resumed run sees what it would have seen. Shapes and dtypes are those
      of `batches(0)` at every step.
    validation: held-out batches of the same shapes, gone through at every validation. The last is
      filled up with rows of weight 0.
    weigh: `batch -> weight`, what the head's weights add up to over a whole validation batch.
    summarize: `(mean loss, summed metrics, summed weight) -> numbers` over all validation batches,
      such as `{"accuracy": metrics["correct"] / weight}`; they go to `metrics.jsonl` as
      `validation_accuracy`.
    baseline: printed beside the result.
    finish: `(params, state) -> text` to print after the last step, such as a sample; canonical
      parameters on one device, and what the stack keeps besides (`{}` if nothing).
    identity: JSON values that mark the data, such as a checksum; a resumed run must have the same.
    data_line: says in a line what it trains on.
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
