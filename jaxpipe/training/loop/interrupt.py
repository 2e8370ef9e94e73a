"""Catches Ctrl-C and SIGTERM, so that a run can save before it ends.

The first signal only asks for an end between two steps; the second ends the process at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
  """Catches SIGINT and SIGTERM inside its `with` block (main thread only).

  Attributes:
    received: the signal that has asked for an end; None until then.
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
