"""Fuses, splits or defers the backward passes of any finished schedule.

Splitting B into I and W (Zero Bubble: Qi et al., 2023, arXiv:2401.10241; 2BP: Rae et al., 2024,
arXiv:2405.18047) is independent of the order of the passes, so it is applied to a finished
schedule and every family has it. 1F1B with P=3, M=3, all three passes of equal length:

fused
  device 0 | F0 F1 F2             B0---    B1---    B2--- | peak 3
  device 1 |    F0 F1       B0--- F2 B1---    B2---       | peak 2
  device 2 |       F0 B0--- F1 B1--- F2 B2---             | peak 1

deferred
  device 0 | F0 F1 F2       I0 W0 I1 W1 I2 W2 | peak 3
  device 1 |    F0 F1    I0 F2 I1 W0 I2 W1 W2 | peak 3
  device 2 |       F0 I0 F1 I1 F2 I2 W0 W1 W2 | peak 3

Deferring is 2BP: F and I keep their order, and a W runs where its device would wait, or else at
the end. At equal times and N devices the bubble goes from (N-1) / N to 2(N-1) / (2N+1) without
microbatches, and with GPipe of N microbatches from (N-1) / (2N-1) to 2(N-1) / (5N-2); with 1F1B of
N from (N-1) / (2N-1) to (N-1) / (4N-1), of 2N from (N-1) / (3N-1) to (N-1) / (7N-1). The price is
memory: what waits for its W is held longer.
"""

import collections
import dataclasses
from collections.abc import Iterator

from jaxpipe.schedules.actions import Action, Order, Step
from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate
from jaxpipe.schedules.walk import walk

# All that the command line accepts.
BACKWARDS = ("fused", "split", "deferred")


def with_backward(schedule: Schedule, backward: str | None, costs: Costs | None = None) -> Schedule:
  """Returns a schedule with its backward passes fused, split or deferred.

  Args:
    schedule: a schedule with fused backward passes, each a B or an I with its W right after it;
      with `split` or None any other, too.
    backward: `fused` makes every backward pass one B; `split` an I and the W right after it;
      `deferred` moves every W into a gap or to the end; None leaves all as it is.
    costs: durations, which say where `deferred` finds gaps.

  Returns:
    The schedule, under the same name.

  Raises:
    ValueError: `backward` is unknown, or would undo a schedule's own places for its W.
  """
  if backward is None:
    return schedule
  if backward not in BACKWARDS:
    raise ValueError(f"unknown backward {backward!r}; known: {', '.join(BACKWARDS)}")
  if backward == "split":
    return _with_order(schedule, (_split(row) for row in schedule.order))
  fused = _with_order(schedule, (_fused(row) for row in schedule.order))
  for d, row in enumerate(fused.order):
    for step in row:
      if isinstance(step, Action) and step.kind is Kind.W:
        raise ValueError(
          f"{schedule.name} places weight gradients on its own, such as {step} on device {d};"
          f' use backward="split" instead of "{backward}"'
        )
  return fused if backward == "fused" else _deferred(fused, costs or Costs())


def _with_order(schedule: Schedule, rows: Iterator[Iterator[Step]]) -> Schedule:
  """Returns a schedule with other lists."""
  return schedule.with_order(tuple(map(tuple, rows)))


def _split(row: tuple[Step, ...]) -> Iterator[Step]:
  """Yields the steps of a list with every B as an I and a W."""
  # Each W directly after its I keeps the order of everything else and the memory of a fused B.
  for step in row:
    backward = _backward(step)
    if backward is None or backward.kind is not Kind.B:
      yield step
    else:
      yield _with_kind(step, Kind.I)
      yield dataclasses.replace(backward, kind=Kind.W)


def _fused(row: tuple[Step, ...]) -> Iterator[Step]:
  """Yields the steps of a list with every I and the W right after it as one B."""
  joined = False
  for step, after in zip(row, (*row[1:], None), strict=True):
    if joined:
      joined = False
      continue
    backward = _backward(step)
    if backward is not None and backward.kind is Kind.I:
      joined = after == dataclasses.replace(backward, kind=Kind.W)
    yield _with_kind(step, Kind.B) if joined else step


def _backward(step: Step) -> Action | None:
  """Returns the I or B of a step, be it alone or overlapped with a forward; None without one."""
  action = step.parts[-1]
  return action if action.kind in (Kind.I, Kind.B) else None


def _with_kind(step: Step, kind: Kind) -> Step:
  """Returns a step with its backward, alone or in a pair, turned into another kind."""
  if isinstance(step, Action):
    return dataclasses.replace(step, kind=kind)
  return dataclasses.replace(step, backward=dataclasses.replace(step.backward, kind=kind))


# How much of a W must fit into a gap for it to go there. Filling only gaps that hold it whole
# delays nobody; where gaps are smaller than a W, delaying others beats idling in all of them.
_FITS = (1.0, 0.5, 0.0)


def _deferred(fused: Schedule, costs: Costs) -> Schedule:
  """Returns the shortest of several ways to fill gaps, never longer than with Ws in place."""
  split = _with_order(fused, (_split(row) for row in fused.order))
  # The first of equally long ones: that which disturbs the passes least.
  filled = [fused.with_order(_fill(split, costs, fits)) for fits in _FITS]
  return min((*filled, split), key=lambda schedule: simulate(schedule, costs).makespan)


def _fill(split: Schedule, costs: Costs, fits: float) -> Order:
  """Moves each W into a gap that holds it, or a share `fits` of it, and the rest to the end."""
  durations = costs.all_durations(split)
  bare = _with_order(split, ((s for s in row if not _is(s, Kind.W)) for row in split.order))
  free: list[float] = [0] * split.devices
  waiting: list[collections.deque[Action]] = [collections.deque() for _ in free]
  rows: list[list[Step]] = [[] for _ in free]
  made: dict[int, tuple[float, int]] = {}

  def run_weight_grad(d: int) -> None:
    """Runs the W that waits longest on device d."""
    rows[d].append(waiting[d][0])
    free[d] += costs.of(waiting[d].popleft(), durations)

  # A W makes nothing that others wait for: when a step is visited, all arrivals are known.
  for visit in walk(bare):
    d, step = visit.device, visit.step
    arrival = max(
      (
        when + (0 if where == d else costs.hop)
        for when, where in map(made.__getitem__, visit.needs)
      ),
      default=0,
    )
    while waiting[d] and _worth(arrival - free[d], durations[Kind.W][waiting[d][0].stage], fits):
      run_weight_grad(d)
    # The optimizer needs the whole gradient of its stage.
    while _is(step, Kind.U) and any(w.stage == step.parts[0].stage for w in waiting[d]):
      run_weight_grad(d)
    rows[d].append(step)
    free[d] = max(free[d], arrival) + costs.of(step, durations)
    made.update((slot, (free[d], d)) for slot in visit.makes)
    if (backward := _backward(step)) is not None:
      waiting[d].append(dataclasses.replace(backward, kind=Kind.W))
  return tuple((*row, *left) for row, left in zip(rows, waiting, strict=True))


def _worth(gap: float, time: float, fits: float) -> bool:
  """Whether a W of this time goes into this gap."""
  return gap > 0 and gap >= fits * time


def _is(step: Step, kind: Kind) -> bool:
  """Whether a step is a single action of a kind."""
  return isinstance(step, Action) and step.kind is kind
