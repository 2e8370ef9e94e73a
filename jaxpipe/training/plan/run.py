"""The base class of runs: all that the training loop needs to know, whatever is trained.

`LmRun` (`training/lm/run.py`) and `TaskRun` (`training/command/task_run.py`) are its subclasses.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax

from jaxpipe.training.flags.run_config import RunConfig
from jaxpipe.training.plan.plan import Plan
from jaxpipe.training.plan.rows import ProcessRows
from jaxpipe.training.plan.run_dir import RunDir, RunRecord
from jaxpipe.training.plan.state import TrainState, state_shapes

Batch = Any
Validate = Callable[[TrainState], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run(Plan, abc.ABC):
  """A run that has been checked and can begin: a plan with its data and its run directory.

  Attributes:
    config: the flags.
    folder: the run directory; nothing has been written to it yet.
    rows: which rows of a batch this process reads, and where on the mesh they lie.
    identity: JSON values that mark the data; a resumed run must have the same.
    data_line: a line about the data for the start of the run; empty for none.
    tokens: how many a step trains on, over all devices; None where batches are not of tokens.
    flops_per_token: model FLOPs of a token, forward and backward; None if unknown.
    loss_unit: of the training loss, such as `nats per token`; empty if it has no name.
    validation_unit: of the validation loss, such as `nats per byte`; empty if it has no name.
  """

  config: RunConfig
  folder: RunDir
  rows: ProcessRows
  identity: Mapping[str, Any]
  data_line: str
  tokens: int | None = None
  flops_per_token: int | None = None
  loss_unit: str = ""
  validation_unit: str = ""

  @property
  def record(self) -> RunRecord[Any]:
    """The record that marks a run directory as this run's: its flags and its data's identity."""
    return RunRecord(config=self.config, data=dict(self.identity))

  def state_shapes(self) -> TrainState:
    """The placed state that steps carry, as `jax.ShapeDtypeStruct`s."""
    averages = self.config.ema > 0
    return state_shapes(self.stack, self.optimizer, self.schedule, averages=averages)

  def begin(self) -> Self:
    """Makes the run directory, or brings its record up to date; returns this run."""
    self.folder.begin(self.record)
    return self

  def first_values(self, key: jax.Array) -> tuple[Any, Any] | None:
    """Returns the placed parameters and model state that the run begins from; None for fresh ones.

    Args:
      key: PRNG key of what is fresh among them.
    """
    return None

  @abc.abstractmethod
  def batches(self, start: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """Opens the batches of the steps from `start` on.

    Args:
      start: number of the first step.

    Returns:
      A context whose value iterates over batches without end; of each batch it has the rows that
      this process reads, leaves [R, ...].
    """

  @abc.abstractmethod
  def validator(self) -> Validate:
    """Returns `validate(state)`, which measures on held-out data: numbers by name, `loss` first."""
