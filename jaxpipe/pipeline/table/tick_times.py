"""When each device begins and ends every tick: a model of the time that a program takes.

Unlike `jaxpipe.simulate`, which by default lets a device go on as soon as the inputs of its next
action are there, this model knows the shape of the program. A loop's body exchanges along every
pair that any of its repetitions needs, and a device waits at each exchange of its tick:

    begins[t + 1, d] = max(ends[t, d],                                   its own action is over,
                           sent[source] + hop for every (source, d))     what it receives is there
    ends[t, d]       = begins[t, d] + durations[t, d]

`sent` is `ends[t]`, or with slack `ends[t - 1]`, since what leaves then was made a tick earlier.
Times are in whatever unit durations and hop are in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxpipe.pipeline.table.program import Doing, Program
from jaxpipe.pipeline.table.segment import Segment
from jaxpipe.schedules import Costs
from jaxpipe.schedules.ticks import ticks


def estimated_time(
  program: Program,
  segments: Sequence[Segment],
  costs: Costs | None = None,
  *,
  blocking: bool = False,
) -> float:
  """Returns the time of all ticks of a program.

  Args:
    program: the tick table.
    segments: how its ticks are divided into loops and straight lines.
    costs: of the actions and of a hop; the default, where F, I and W take one unit each.
    blocking: as for `tick_times`.
  """
  costs = costs or Costs()
  durations = tick_durations(program, costs)
  begins, _ = tick_times(program, segments, durations, costs.hop, blocking=blocking)
  return float(begins[-1].max())


def tick_durations(program: Program, costs: Costs) -> np.ndarray:
  """Returns how long every device's action takes on every tick, by its kind and stage.

  Returns:
    float64 [ticks, P] in the unit of `costs`; 0 where a device has no action.
  """
  times = costs.all_durations(program.schedule)
  durations = np.zeros((program.ticks, program.schedule.devices))
  # By position, since `program.at` leaves out gathers of weights.
  rows = zip(program.schedule.order, ticks(program.schedule, program.slack), strict=True)
  for d, (row, row_ticks) in enumerate(rows):
    for step, tick in zip(row, row_ticks, strict=True):
      (action,) = step.parts  # a program's schedule has no overlapped pairs
      durations[tick, d] = times[action.kind][action.stage]
  return durations


def tick_times(
  program: Program,
  segments: Sequence[Segment],
  durations: np.ndarray,
  hop: float,
  *,
  blocking: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns when each device begins every tick, and when it ends its action there.

  Args:
    program: the tick table.
    segments: how its ticks are divided into loops and straight lines.
    durations: float64 [ticks, P], of the actions.
    hop: latency of an exchange between two devices.
    blocking: whether a sender also waits for its receiver, as devices of JAX's CPU backend do.

  Returns:
    Begins, float64 [1 + ticks, P], whose last row is when each device is done; and ends, float64
    [ticks, P].
  """
  begins, ends = np.zeros((1 + program.ticks, program.schedule.devices)), np.zeros(durations.shape)
  for segment in segments:
    pairs = [exchanges(body) for body in segment.bodies(program.doing)]
    for tick in range(segment.start, segment.stop):
      sources, targets = pairs[(tick - segment.start) % segment.period]
      ends[tick] = begins[tick] + durations[tick]
      # Before the first tick nothing was made: with slack, what travels on it is waited for by
      # nobody, and counts as there from the start.
      sent = ends[tick] if not program.slack else ends[tick - 1] if tick else begins[0]
      begins[tick + 1] = ends[tick]
      # `maximum.at`, for a device may receive from two others on one tick.
      np.maximum.at(begins[tick + 1], targets, sent[sources] + hop)
      if blocking:
        np.maximum.at(begins[tick + 1], sources, sent[targets] + hop)
  return begins, ends


def exchanges(doing: Doing) -> tuple[np.ndarray, np.ndarray]:
  """Returns senders and receivers of all that a tick sends between two devices, int64 [n] each."""
  pairs = [pair for route in doing.pairs for pair in route if pair[0] != pair[1]]
  sources, targets = np.array(pairs, int).reshape(-1, 2).T
  return sources, targets
