"""Turns the results of steps into records, one step late, so that no device waits for the host.

JAX dispatches a step and returns before it is done; to read its loss is to wait for it. So the next
step is dispatched first:

    host    dispatch k   dispatch k+1   fetch k   dispatch k+2   fetch k+1
    device  ───── step k ─────┼───── step k+1 ────┼──────── step k+2
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import jax

from jaxpipe.training.loop.metrics import Record
from jaxpipe.training.loop.step import StepResult


class Journal:
  """Holds the newest step until the next one has been dispatched, and then writes its record.

  Args:
    tokens: how many each step trains on, over all devices; None where batches are not of tokens.
    write: is called with each record once, in order.
  """

  def __init__(self, tokens: int | None, write: Callable[[Record], None]) -> None:
    self._tokens, self._write = tokens, write
    self._pending: tuple[int, StepResult, float] | None = None
    self._ready = 0.0

  def add(self, step: int, result: StepResult) -> None:
    """Takes a step that was just dispatched, and writes the record of the one before."""
    dispatched = time.perf_counter()
    self.flush()
    self._pending = (step, result, dispatched)

  def flush(self, validate: Callable[[], Mapping[str, float]] | None = None) -> None:
    """Waits for the step that is held, if any, and writes its record.

    Args:
      validate: returns the validation `loss` and what else is measured with it. It is called once
        the step's time has been taken, which it does not add to.
    """
    if self._pending is None:
      return
    step, result, dispatched = self._pending
    loss, grad_norm, learning_rate, _ = jax.device_get(result)
    ready = time.perf_counter()
    # A step starts when the one before ends; after a pause (validation, checkpoint), when sent.
    seconds = ready - max(self._ready, dispatched)
    self._ready, self._pending = ready, None
    more = {f"validation_{name}": float(v) for name, v in validate().items()} if validate else {}
    self._write(
      Record(
        step=step,
        loss=float(loss),
        grad_norm=float(grad_norm),
        learning_rate=float(learning_rate),
        tokens_per_second=self._tokens and self._tokens / seconds,
        step_seconds=seconds,
        validation_loss=more.pop("validation_loss", None),
        more=more,
      )
    )
