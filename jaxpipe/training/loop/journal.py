"""Turns the results of steps into records, one step late, so that no device waits for the host.

JAX dispatches a step and returns before it is done; to read its loss is to wait for it. So the next
step is dispatched first:

    host    dispatch k   dispatch k+1   fetch k   dispatch k+2   fetch k+1
    device  ───── step k ─────┼───── step k+1 ────┼──────── step k+2

Where a step runs inside the call that dispatches it, as it may on CPU, its result is ready when the
call returns, and the step is timed from the call's start to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from jaxpipe.training.loop.metrics import Record
from jaxpipe.training.loop.step import StepResult
from jaxpipe.training.processes.processes import say


class Journal:
  """Holds the newest step until the next one has been dispatched, and then writes its record.

  Args:
    tokens: how many each step trains on, over all devices; None where batches are not of tokens.
    write: is called with each record once, in order.
    clock: returns the time in seconds.
  """

  def __init__(
    self,
    tokens: int | None,
    write: Callable[[Record], None],
    clock: Callable[[], float] = time.perf_counter,
  ) -> None:
    self._tokens, self._write, self._clock = tokens, write, clock
    self._pending: _Pending | None = None
    self._nothing = 0  # steps without a loss and a gradient
    # When the newest step whose record is written was done, and when `add` or `flush` returned.
    self._ready = self._left = clock()

  def add(self, step: int, result: StepResult, began: float | None = None) -> None:
    """Takes a step that was just dispatched, and writes the record of the one before.

    Args:
      step: its number.
      result: what the dispatch returned.
      began: the clock before the dispatch; None: nothing but the dispatch has happened since the
        last call of `add` or `flush`.
    """
    now, began = self._clock(), self._left if began is None else began
    done = now if _is_ready(result) else None
    self.flush()
    self._pending = _Pending(step, result, began, done)
    self._left = self._clock()

  def flush(self, validate: Callable[[], Mapping[str, float]] | None = None) -> None:
    """Waits for the step that is held, if any, and writes its record.

    Args:
      validate: returns the validation `loss` and what else is measured with it. It is called once
        the step's time has been taken, which it does not add to.
    """
    if self._pending is None:
      return
    step, result, began, done = self._pending
    loss, grad_norm, learning_rate, _ = jax.device_get(result)
    # A result that was ready as soon as it was dispatched has waited here since.
    ready = self._clock() if done is None else done
    # A step starts when the one before ends; after a pause (validation, checkpoint), when sent.
    seconds = ready - max(self._ready, began)
    self._ready, self._pending = ready, None
    if float(loss) == float(grad_norm) == 0:
      self._nothing += 1
      say(
        f"step {step}: loss and gradient are exactly zero, as where all weights of a batch are;"
        f" {self._nothing} such steps so far"
      )
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
    self._left = self._clock()


class _Pending(NamedTuple):
  """A step whose record is not written yet.

  Attributes:
    step: its number.
    result: its numbers, which may still be computed.
    began: the clock before it was dispatched.
    done: the clock at which it was seen to be done; None where it was still under way.
  """

  step: int
  result: StepResult
  began: float
  done: float | None


def _is_ready(result: StepResult) -> bool:
  """Whether a step is done; numbers that are no JAX arrays are there already."""
  ready = (getattr(leaf, "is_ready", None) for leaf in jax.tree.leaves(result))
  return all(is_ready() for is_ready in ready if is_ready is not None)
