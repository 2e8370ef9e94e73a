"""Writes the numbers of each step to a JSONL file and to tensorboard events.

The file survives a killed run, and each step stands in it once: a run that died some steps after
its last checkpoint will do these steps again, so that their lines are dropped when it resumes, by
exchanging the whole file at once.
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
    loss: mean over the batch's targets; of text in nats per token.
    grad_norm: global norm of the gradient before clipping.
    learning_rate: that the update was done with.
    tokens_per_second: tokens trained on, over all devices; None where batches are not of tokens.
    step_seconds: from the end of the step before, or from its own start after a pause.
    validation_loss: after the update, of text in nats per byte; None where it was not measured.
    more: what else was measured at that validation, by key of the line, such as
      `validation_accuracy`; empty where nothing was.
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
    """Returns the line's keys and values: `more` stands last, a rate of None is left out."""
    line = {**vars(self), **self.more}
    del line["more"]
    if self.tokens_per_second is None:
      del line["tokens_per_second"]
    return line


def read_records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the lines of a metrics file as dicts; nothing if there is no such file.

  A last line that a kill or a power cut has left incomplete is left out.

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
  """Drops the lines of step `step` and later; the file is exchanged whole, or not at all."""
  if not path.exists():
    return
  with atomic_file(path) as file:
    for record in read_records(path):
      if record["step"] < step:
        file.write(_line(record))


class MetricsWriter:
  """Appends records to the JSONL file and to the tensorboard events; closes with its `with` block.

  Args:
    path: the JSONL file, made if missing.
    events: folder of the tensorboard events.
    start: the first step that will be written; lines of that step and later ones are dropped.
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
  """Formats a line of the file, with its end."""
  # json writes floats by repr, which reads back to the same float.
  return (json.dumps(values) + "\n").encode()
