"""Reads the host's clock inside the program, before and after every tick's action.

XLA orders what it runs by data alone, so a reading must be tied by data to what comes before it and
after it. The callback is given a number computed from everything that must be finished first, and
everything that must wait for the reading passes a `select` on its answer (see `order.py`).

    made ─▶ one number ─▶ [clock] ─▶ 0 ─▶ select ─▶ held
                              held before ──┘

A program that was built without a probe contains nothing of this.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.device.order import hold, touch
from jaxpipe.pipeline.layer.varying import vary
from jaxpipe.pipeline.storage.rings import Tree

# Which reading of a tick: before its action, or when all that the action made is there.
START, END = 0, 1

# `probe(point, made, held) -> held`: reads the clock after `made` and before what is returned.
Probe = Callable[[int, Tree, Tree], Tree]


@dataclasses.dataclass(frozen=True)
class Clock:
  """A probe that notes the host's time at every reading.

  Attributes:
    axes: names of the mesh axes.
    readings: (position on the stage axis, START or END, nanoseconds) of every reading so far, those
      of one device in the order of its ticks. Of the devices with the same position on the stage
      axis only the first is noted.
  """

  axes: Sequence[str]
  readings: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

  def __call__(self, point: int, made: Tree, held: Tree) -> Tree:
    """Returns `held`, bit for bit, once `made` has been computed and the clock has been read."""
    peers = [lax.axis_index(axis) for axis in self.axes if axis != STAGE]
    first = sum(peers, jnp.int32(0)) == 0
    device = jnp.where(first, lax.axis_index(STAGE), -1)
    answer = jax.ShapeDtypeStruct((), np.int32)
    # Not `ordered`, which is refused where several devices run one program.
    zero = io_callback(functools.partial(self._note, point), answer, device, touch(made))
    return hold(vary(zero, self.axes) != 0, held)

  def _note(self, point: int, device: Any, _: Any) -> np.int32:
    # What the call itself takes belongs to no action: it is over at START, and not begun at END.
    early = time.perf_counter_ns()
    number = int(device)
    if number >= 0:
      self.readings.append((number, point, time.perf_counter_ns() if point == START else early))
    return np.int32(0)
