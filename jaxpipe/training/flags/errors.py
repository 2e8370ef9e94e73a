"""Errors of a command line, worded so that the reader knows which flag to change.

All of them are `ConfigError`s of one line, which a command prints and then exits with status 2; any
other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ConfigError(ValueError):
  """A run that cannot start; the message is one line: flag or file, both numbers, remedy."""


class AgreedError(ConfigError):
  """A ConfigError that every process of a run raises at the same point; process 0 alone prints it.

  Args:
    message: one line, as for `ConfigError`.
    process: number of this process; it goes into the attribute `process`.
  """

  def __init__(self, message: str, process: int) -> None:
    super().__init__(message)
    self.process = process


@contextlib.contextmanager
def naming(*flags: str) -> Iterator[None]:
  """Puts the flags that decide in front of the message of any ValueError raised in the block.

  Schedules, meshes and models are libraries as well: what they raise names their arguments and
  numbers, and no flags.

  Args:
    flags: each as it would be typed, such as `--layers=8`.

  Raises:
    ConfigError: in place of any ValueError or OSError; its message is one line.
  """
  try:
    yield
  except (ValueError, OSError) as error:
    raise ConfigError(f"{' '.join(flags)}: {' '.join(str(error).split())}") from error
