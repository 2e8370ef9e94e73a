"""Ctrl-C that saves: the first signal asks for an end between steps, the second ends at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
  """Catches SIGINT and SIGTERM inside its `with` block (main thread only).

  Attributes:
    received: the signal that asked for the end, or None.
  """

  def __init__(self) -> None:
    self.received: signal.Signals | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> Self:
    self._before = {number: signal.signal(number, self._catch) for number in _SIGNALS}
    return self

  def _catch(self, number: int, frame: FrameType | None) -> None:
    self.received = signal.Signals(number)
    # The system's own action needs no Python: it ends the process even where a device hangs.
    for other in _SIGNALS:
      signal.signal(other, signal.SIG_DFL)

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
