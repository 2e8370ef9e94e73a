"""Numbers of each step, kept: a JSONL file that survives being killed, and tensorboard events.

Each step stands in the file once. A run that died after its last checkpoint has written steps that
it will do again; on resume those lines go first, in one atomic exchange.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter

from jaxpipe.data.files import atomic_file
from jaxpipe.training.flags.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """One line of `metrics.jsonl`.

  Attributes:
    step: number of the update, from 0.
    loss: mean over the batch's targets, nats per token.
    grad_norm: global norm before clipping.
    learning_rate: of the update.
    tokens_per_second: trained, over all devices; None where batches are not of tokens.
    step_seconds: from the end of the step before, or from its own start after a pause.
    validation_loss: after the update, nats per byte for text; None where it was not measured.
    more: what else was measured with it, such as validation_accuracy.
  """

  step: int
  loss: float
  grad_norm: float
  learning_rate: float
  tokens_per_second: float | None
  step_seconds: float
  validation_loss: float | None = None
  more: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def to_dict(self) -> dict[str, Any]:
    """The line: all but a rate that there is not, and `more` after the others."""
    line = {**vars(self), **self.more}
    del line["more"]
    if self.tokens_per_second is None:
      del line["tokens_per_second"]
    return line


def read_records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the lines of a metrics file; what a kill or a power cut left of the last is left out.

  Raises:
    ConfigError: a damaged line before the last one.
  """
  if not path.exists():
    return
  damaged = None
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if damaged is not None:
        raise ConfigError(f"{path}: line {damaged} is damaged; delete it, or use another --run_dir")
      try:
        # As text, since json guesses at other encodings where bytes are zero.
        yield json.loads(line.decode())
      except ValueError:
        damaged = number


def drop_from(path: pathlib.Path, step: int) -> None:
  """Leaves the lines of the steps before `step`, whole or not at all."""
  if not path.exists():
    return
  with atomic_file(path) as file:
    for record in read_records(path):
      if record["step"] < step:
        file.write(_line(record))


class MetricsWriter:
  """Appends to both, from one step on; closes with its `with` block.

  Args:
    path: the JSONL file, made if missing.
    events: folder of the tensorboard events.
    start: the first step that will be written; what is there from it on is dropped.
  """

  def __init__(self, path: pathlib.Path, events: pathlib.Path, start: int) -> None:
    drop_from(path, start)
    self._file = path.open("ab")
    # Steps from `start` on that an earlier life wrote are hidden, as they are dropped above.
    self._events = SummaryWriter(logdir=str(events), purge_step=start)

  def write(self, record: Record) -> None:
    """Writes one step; it is in the file, though not yet on the disk, when this returns."""
    values = record.to_dict()
    self._file.write(_line(values))
    self._file.flush()
    for name, value in values.items():
      # Tensorboard would draw a missing value as a point.
      if name != "step" and value is not None:
        self._events.add_scalar(name, value, record.step)

  def sync(self) -> None:
    """Puts what was written on the disk, so that no checkpoint is ahead of its metrics."""
    os.fsync(self._file.fileno())
    self._events.flush()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._file.close()
    self._events.close()


def _line(values: dict[str, Any]) -> bytes:
  # repr, which json uses for floats, reads back to the same float.
  return (json.dumps(values) + "\n").encode()
