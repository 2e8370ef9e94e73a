"""What the loop needs to know of a run, whatever it trains."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from jaxpipe.training.flags.run_config import RunConfig
from jaxpipe.training.plan.plan import Plan
from jaxpipe.training.plan.rows import ProcessRows
from jaxpipe.training.plan.run_dir import RunDir, RunRecord
from jaxpipe.training.plan.state import TrainState

Batch = Any
Validate = Callable[[TrainState], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run(Plan, abc.ABC):
  """A run that can start.

  Attributes:
    config: what was asked for.
    folder: its run directory, not yet touched.
    rows: which rows of a batch this process needs, and where they go.
    identity: JSON values that mark the data; a resumed run must have the same.
    data_line: says in a line what it trains on.
    tokens: trained in a step, over all devices; None where batches are not of tokens.
    flops_per_token: model FLOPs of a token, forward and backward; None if unknown.
    loss_unit, validation_unit: of the losses, such as `nats per byte`.
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
    """What marks a run directory as this run's."""
    return RunRecord(config=self.config, data=dict(self.identity))

  def begin(self) -> Self:
    """Makes the run directory, or brings its record up to date; returns this run."""
    self.folder.begin(self.record)
    return self

  def first_params(self) -> Any:
    """Placed parameters that the run begins from; None for fresh ones."""
    return None

  @abc.abstractmethod
  def batches(self, start: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """Batches of the steps from `start` on, without end; of each, this process's rows."""

  @abc.abstractmethod
  def validator(self) -> Validate:
    """Returns `validate(state)`: what is measured on held-out data, `loss` first."""
