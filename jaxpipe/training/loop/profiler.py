"""Traces chosen steps by JAX's profiler, for https://ui.perfetto.dev or tensorboard."""

from __future__ import annotations

import pathlib

import jax


class Profiler:
  """Traces the steps of a range into a folder.

  Args:
    steps: the numbers of the steps to trace; empty for none.
    folder: where the trace is written, made when it ends.
  """

  def __init__(self, steps: range, folder: pathlib.Path) -> None:
    self._steps, self._folder, self._running = steps, folder, False

  def before(self, step: int) -> None:
    """Starts or stops the trace where that is due; call it with no step under way."""
    if step in self._steps and not self._running:
      jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
      self._running = True
    elif step not in self._steps:
      self.stop()

  def is_edge(self, step: int) -> bool:
    """Whether `before(step)` would start or stop the trace."""
    return (step in self._steps) != self._running

  def stop(self) -> None:
    """Ends a trace that is running and writes it."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
