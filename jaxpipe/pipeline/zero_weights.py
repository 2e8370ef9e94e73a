"""Warns of steps whose weights sum to zero, without waiting for any of them.

Loss and gradients of such a step are zero: its batch teaches nothing, which nobody would see. What
its weight is, is known once the devices are done; so it is looked at when it is there.
"""

from __future__ import annotations

import collections
import inspect
import warnings
from typing import Any

import jax


class ZeroWeights:
  """Counts the calls of one step, and those among them whose weight was zero."""

  def __init__(self) -> None:
    self._seen = self._zero = 0
    self._under_way: collections.deque[Any] = collections.deque()

  def add(self, weight: jax.Array) -> None:
    """Takes the weight of a call, [], and warns of this and earlier ones that are known by now.

    Inside an outer `jax.jit` there is no weight to look at, and nothing is counted.
    """
    if isinstance(weight, jax.core.Tracer):
      return
    self._under_way.append(weight)
    before = self._zero
    while self._under_way and self._under_way[0].is_ready():
      self._seen += 1
      self._zero += float(self._under_way.popleft()) == 0
    if self._zero > before:
      warnings.warn(
        f"the weights of a batch sum to zero, so that its loss and gradients are zero:"
        f" {self._zero} of {self._seen} calls so far; leave such batches out, or give a row weight",
        RuntimeWarning,
        stacklevel=_frames_of_ours(),
      )


def _frames_of_ours() -> int:
  """Frames from the caller up to the first that is not of this package, which a warning blames."""
  frame, count = inspect.currentframe(), 0
  while frame is not None and frame.f_globals["__name__"].partition(".")[0] == "jaxpipe":
    frame, count = frame.f_back, count + 1
  return count
