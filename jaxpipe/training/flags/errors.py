"""What is wrong with a command, said so that the reader knows which flag to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ConfigError(ValueError):
  """A run that cannot start; the message is one line: flag or file, both numbers, remedy."""


class AgreedError(ConfigError):
  """One that all processes of a run raise alike; process 0 speaks for them.

  Args:
    message: as for any error.
    process: which of them this is.
  """

  def __init__(self, message: str, process: int) -> None:
    super().__init__(message)
    self.process = process


@contextlib.contextmanager
def naming(*flags: str) -> Iterator[None]:
  """Puts the flags that decide before the message of any ValueError raised inside.

  The parts that raise know numbers but no flags, since they are libraries too.

  Args:
    flags: each as it would be typed, such as `--layers=8`.

  Raises:
    ConfigError: in place of any ValueError or OSError, in one line.
  """
  try:
    yield
  except (ValueError, OSError) as error:
    raise ConfigError(f"{' '.join(flags)}: {' '.join(str(error).split())}") from error
