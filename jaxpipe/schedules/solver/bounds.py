"""Bounds the objective of every schedule from below, by one device or one microbatch at a time.

The time that device 1 cannot avoid, P=4, memory for two forwards:

  device 1 |    F0 F1             I0 ... all of its work that is left ...  |
           [1] head  [2] wait for the gradient: forwards that memory allows
                                  [3] work, then [4] the way home of the last gradient
"""

from jaxpipe.schedules.solver.problem import Problem


def lower_bound(problem: Problem) -> int:
  """Returns a number that no schedule of a problem can go below, in the problem's unit of time."""
  P = problem.placement.devices
  makespan = problem.objective == "makespan"
  bounds = [_device(problem, d, makespan) for d in range(P)]
  if makespan:
    forward, backward = _passes(problem)
    bounds.append(forward[-1] + backward[0] + problem.times[2 * problem.placement.stages])
  return max(bounds)


def _passes(problem: Problem) -> tuple[list[int], list[int]]:
  """Returns the earliest ends of microbatch 0's F and of its I, each by stage.

  The Is count from the end of the last stage's F.
  """
  S, times, lags = problem.placement.stages, problem.times, problem.lags
  forward, backward = [], [0] * S
  clock = 0
  for s in range(S):
    clock += lags[s] + times[s]
    forward.append(clock)
  clock = 0
  for s in reversed(range(S)):
    clock += lags[S + s] + times[S + s]
    backward[s] = clock
  return forward, backward


def _device(problem: Problem, d: int, makespan: bool) -> int:
  """Returns a bound from the work of device d, on the makespan or else on the span."""
  S, M, times = problem.placement.stages, problem.microbatches, problem.times
  held = problem.placement.table[d]
  forward, backward = _passes(problem)
  first, last = min(held), max(held)
  forwards = M * sum(times[s] for s in held)
  inputs = M * sum(times[S + s] for s in held)
  weights = M * sum(times[2 * S + s] for s in held)
  # A span counts from the device's own first forward; nothing precedes that but other devices.
  head = forward[first] - times[first] if makespan else 0  # [1]
  origin = 0 if makespan else forward[first] - times[first]
  # The device's first I is that of its last stage: the others wait for it.
  gradient = forward[-1] + backward[last] - times[S + last] - origin  # [2]
  before = min(_affordable(problem, d), forwards)
  # After its last I there is that one's W at least; the makespan also waits for the way home.
  home = min(_after(problem, s, makespan, backward) for s in held)  # [4]
  return max(
    head + forwards + inputs + weights,
    head + forwards + inputs + home,
    gradient + forwards - before + inputs + weights,  # [3]
    gradient + forwards - before + inputs + home,
    head + _occupied(problem, d, forward, backward),
  )


def _occupied(problem: Problem, d: int, forward: list[int], backward: list[int]) -> int:
  """Returns a bound from memory: what all microbatches hold, times how long, over the limit."""
  S, times, changes = problem.placement.stages, problem.times, problem.changes
  held = problem.placement.table[d]
  kept = {s: changes[s] + changes[S + s] for s in held}  # from the end of I to that of W
  # Letters that leave less than nothing held would offset what others hold.
  if problem.limits is None or any(
    min(changes[s], kept[s], kept[s] + changes[2 * S + s]) < 0 for s in held
  ):
    return 0
  total = 0
  for s in held:
    trip = forward[-1] - forward[s] + times[s] + backward[s]
    total += problem.microbatches * (changes[s] * trip + kept[s] * times[2 * S + s])
  return -(-total // max(problem.limits[d], 1))


def _after(problem: Problem, s: int, makespan: bool, backward: list[int]) -> int:
  """Returns the least time from the end of a last I on stage s to the end of the objective."""
  S, times = problem.placement.stages, problem.times
  own = times[2 * S + s]
  return max(own, backward[0] - backward[s] + times[2 * S]) if makespan else own


def _affordable(problem: Problem, d: int) -> int:
  """Returns the most time of forwards that a device's memory allows before its first I."""
  M = problem.microbatches
  held = problem.placement.table[d]
  total = M * sum(problem.times[s] for s in held)
  if problem.limits is None:
    return total
  # Forwards that hold nothing, or give back, are free; the rest fill what there is by best use,
  # the last of them in part (with one stage, whole ones only).
  left = problem.limits[d] - sum(M * min(problem.changes[s], 0) for s in held)
  time = sum(M * problem.times[s] for s in held if problem.changes[s] <= 0)
  costly = [s for s in held if problem.changes[s] > 0]
  for s in sorted(costly, key=lambda s: -problem.times[s] / problem.changes[s]):
    count = min(M, left // problem.changes[s])
    time += count * problem.times[s]
    left -= count * problem.changes[s]
    if count < M:
      if len(costly) > 1:
        time += -(-left * problem.times[s] // problem.changes[s])
      break
  return min(time, total)
