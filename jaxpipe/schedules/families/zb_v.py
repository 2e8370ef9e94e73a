"""ZB-V: zero bubble while holding as many chunks as 1F1B (Qi et al., 2023, arXiv:2401.10241).

The chunks of a device are folded into a V, so that the device that runs the first stage runs the
last one too, and gradients start where forwards end. P=2, M=4, the second chunk in small letters:

  device 0 | F0 F1 F2 f0 i0 w0 f1 i1 w1 F3 I0 W0 f2 i2 w2 I1 W1 f3 i3 w3 I2 W2 I3 W3    | peak 4
  device 1 |    F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 F3 I1 W1 f3 i2 w2 I2 i3 I3 W2 W3 w3 | peak 4

  device d:  | 2(P-d)-1 Fs of chunk 0 | d times F F | P-d times F I | F I F I ...... | I I .. I |
             [1] fill                   [2] of chunks 1 and 0         [3] chunk 0, 1   [4] drain

W follows its I at once up to [4], where it waits for a gap. At equal times and M >= 2P - 1 no
device is ever idle between its first and its last action, and none holds more than 2P chunks,
which are as much as 1F1B's P stages. The figure in the paper drains in another order with the
same metrics.

The authors plan for other costs by a greedy schedule; here the pattern competes with blocks of
other paces, greedy schedules and local search (`v_search`), which plan with `costs` and keep to
`memory_limit` where one is given.
"""

import itertools
import math

from jaxpipe.schedules.actions import Order
from jaxpipe.schedules.costs import memory_changes
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.building_block import v_half_block, v_min_block
from jaxpipe.schedules.planning.list_schedule import Policy, all_work, list_schedule
from jaxpipe.schedules.planning.v_search import best_v
from jaxpipe.schedules.planning.v_trials import Task, Trial, block_trial, block_trials
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec

_Pass = tuple[Kind, int, int]


def zb_v(spec: Spec) -> Schedule:
  """Builds the V schedule of shortest span under the limit, and of equals the shortest step.

  Args:
    spec: devices and microbatches; without a memory limit, 2P chunks whatever `memory` says.

  Returns:
    The schedule, its backward split.

  Raises:
    ValueError: the limit is too low for one microbatch.
  """
  P = spec.devices
  limited = spec.memory_limit is not None
  task = Task(
    name="zb-v",
    placement=Placement.v(P),
    microbatches=spec.microbatches,
    costs=spec.costs,
    memory=spec.memory if limited else (1, 0, -1),
    limit=spec.limits() if limited else (2 * P,) * P,
    objective="span",
    # For less memory than the pattern takes none was drawn to be best.
    effort=8 if limited and _below_pattern(spec) else 1,
  )
  return best_v(task, patterns(task))


def _below_pattern(spec: Spec) -> bool:
  """Whether some device may hold less than the 2P chunks that the drawn pattern takes."""
  forward = memory_changes(spec.memory, 2 * spec.devices)[Kind.F]
  return min(spec.limits()) < 2 * spec.devices * max(forward)


def patterns(task: Task) -> list[Trial]:
  """Returns the drawn pattern, then variants of it, then blocks that keep to the limit.

  Args:
    task: sizes, costs and limit.
  """
  variants = itertools.product((False, True), (True, False), (0, 0.5, 1))
  found = [
    _pattern_trial(task, early=early, strict=strict, gap=gap) for early, strict, gap in variants
  ]
  # The drawn one first: the others of its kind differ by costs only.
  found.insert(0, found.pop(6))
  P = task.placement.devices
  blocks = [block_trial(task, block) for block in (v_half_block(P), v_min_block(P))]
  return [*found, *blocks, *block_trials(task)]


def _pattern_trial(task: Task, *, early: bool, strict: bool, gap: float) -> Trial:
  """Returns the trial that makes one variant of the pattern."""
  return lambda: _in_pattern(task, early=early, strict=strict, gap=gap)


def _in_pattern(task: Task, *, early: bool, strict: bool, gap: float) -> Order:
  """Plans with F and I in the pattern's order.

  Args:
    task: sizes and costs.
    early: whether W follows its I at once up to the drain; else it waits for a gap as well.
    strict: whether the drain keeps to the pattern's order.
    gap: the share of a W that must fit into a gap.

  Returns:
    Each device's list.
  """
  P, M = task.placement.devices, task.microbatches
  # By position of the kind in F, I, W, by stage and microbatch: its place in the pattern's row
  # (infinite where a W waits for a gap), and its rank (infinite in a drain that is not strict).
  places = [[[math.inf] * M for _ in range(2 * P)] for _ in range(3)]
  ranks = [[[math.inf] * M for _ in range(2 * P)] for _ in range(2)]
  for d in range(P):
    row, drain = _row(d, P, M)
    for i, (kind, stage, m) in enumerate(row):
      which = 0 if kind is Kind.F else 1
      places[which][stage][m] = i
      if strict or i < drain:
        ranks[which][stage][m] = i
      if which == 1 and early and i < drain:
        places[2][stage][m] = i

  def urgency(kind: Kind, stage: int, microbatch: int) -> float:
    """Returns the place in the pattern's row."""
    which = 0 if kind is Kind.F else 1 if kind is Kind.I else 2
    return places[which][stage][microbatch]

  def rank(kind: Kind, stage: int, microbatch: int) -> float:
    """Returns the place in the pattern's row where that order is prescribed."""
    return ranks[kind is Kind.I][stage][microbatch]

  policy = Policy(urgency=urgency, rank=rank, gap=gap)
  return list_schedule(
    task.placement,
    all_work(task.placement, M),
    policy,
    costs=task.costs,
    memory=task.memory,
    limit=task.limit,
  )


def _row(d: int, P: int, M: int) -> tuple[list[_Pass], int]:
  """Returns device d's Fs and Is in the pattern's order, and the position where it drains."""
  first, second = d, 2 * P - 1 - d
  # With fewer microbatches than fill the V, those that are missing are left out.
  total = max(M, 2 * P - 1)
  count = dict.fromkeys(itertools.product((Kind.F, Kind.I), (first, second)), 0)
  row: list[_Pass] = []

  def run(kind: Kind, stage: int) -> None:
    """Appends the next microbatch's pass on a stage, if there is such a microbatch."""
    m = count[kind, stage]
    count[kind, stage] += 1
    if m < M:
      row.append((kind, stage, m))

  for _ in range(2 * (P - d) - 1):  # [1]
    run(Kind.F, first)
  for _ in range(d):  # [2]
    run(Kind.F, second)
    run(Kind.F, first)
  for _ in range(P - d):
    run(Kind.F, second)
    run(Kind.I, second)
  while count[Kind.F, second] < total:  # [3]
    if count[Kind.F, first] < total:
      run(Kind.F, first)
    run(Kind.I, first)
    run(Kind.F, second)
    run(Kind.I, second)
  drain = len(row)
  for _ in range(d):  # [4]
    run(Kind.I, first)
    run(Kind.I, second)
  while count[Kind.I, first] < total:
    run(Kind.I, first)
  return row, drain
