"""V-Min, V-Half and V-ZB: three paces down and up a V, which hold fewer or more chunks.

Controllable Memory (Qi et al., 2024, arXiv:2405.15362): the pace at which a microbatch walks down
and up the V decides how long its chunks are held. V-Min at P=3, M=3, the second chunk in small
letters:

  device 0 | F0 F1          f0 i0 F2 w0 f1 i1 w1 I0 W0    f2 i2 I1 W1 w2    I2 W2 | peak 4
  device 1 |    F0 F1    f0       i0 f1 w0 F2 I0 i1 W0 f2 w1 I1 i2 W1 w2 I2 W2    | peak 4
  device 2 |       F0 f0 F1 f1       i0 I0 W0 F2 w0 f2 i1 I1 W1 w1 i2 I2 W2 w2    | peak 4

At unit times and M = 4P, with k chunks held at most and everything counted in ticks, the schedules
here were measured, for P = 3 to 16, to have

  V-Min    k = 2 (floor((P+1)/3) + 1)       idle 4P - 5, and 4P - 7 if 3 divides P
  V-Half   k = P + 2, or P + 1 if P is odd  idle 6P - 3k - 1, the paper's lower bound
  V-ZB     k = 2P                           idle 0 between a device's first and last action

1F1B holds 2P such chunks. Where passes take unequal times, V-Min pays for it with every
microbatch; `v_search` then looks for other schedules in the same memory.
"""

from jaxpipe.schedules.families.zb_v import patterns
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.building_block import Block, v_half_block, v_min_block
from jaxpipe.schedules.planning.v_search import best_v
from jaxpipe.schedules.planning.v_trials import Task, Trial, block_trial, block_trials
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.solver.problem import Objective
from jaxpipe.schedules.spec import Spec


def v_min(spec: Spec) -> Schedule:
  """Builds V-Min: a third of 1F1B's chunks, as fast down and up the V as passes can follow.

  Args:
    spec: devices and microbatches.

  Returns:
    The schedule, its backward split.
  """
  block = v_min_block(spec.devices)
  return _from_block("v-min", spec, block, 2 * ((spec.devices + 1) // 3 + 1))


def v_half(spec: Spec) -> Schedule:
  """Builds V-Half: about half of 1F1B's chunks, down the V at half the pace.

  Args:
    spec: devices and microbatches.

  Returns:
    The schedule, its backward split.
  """
  block = v_half_block(spec.devices)
  return _from_block("v-half", spec, block, spec.devices + 2 - spec.devices % 2)


def v_zb(spec: Spec) -> Schedule:
  """Builds V-ZB: as many chunks as 1F1B, no bubble between a device's first and last action.

  Args:
    spec: devices and microbatches.

  Returns:
    The schedule, its backward split.
  """
  task = _task("v-zb", spec, 2 * spec.devices, "span")
  return best_v(task, patterns(task))


def _from_block(name: str, spec: Spec, block: Block, limit: int) -> Schedule:
  """Repeats a drawn block where it suits costs and sizes; else searches, at most `limit` chunks."""
  task = _task(name, spec, limit, "makespan")
  # Drawn for equal times, and for steps that are long enough to fill the V.
  if spec.microbatches >= 2 * spec.devices and _is_even(spec):
    order = block_trial(task, block)()
    return Schedule(name, task.placement, spec.microbatches, order)
  trials: list[Trial] = [block_trial(task, block, gap) for gap in (0, 1)]
  return best_v(task, [*trials, *block_trials(task)])


def _task(name: str, spec: Spec, limit: int, objective: Objective) -> Task:
  """Returns what `v_search` is to search for, at most `limit` chunks on every device."""
  # The limit that makes the family counts chunks; one in another unit is a condition on the result.
  return Task(
    name=name,
    placement=Placement.v(spec.devices),
    microbatches=spec.microbatches,
    costs=spec.costs,
    memory=(1, 0, -1),
    limit=(limit,) * spec.devices,
    objective=objective,
  )


def _is_even(spec: Spec) -> bool:
  """Whether every F, I and W takes equally long, and hops and head take nothing."""
  durations = spec.costs.durations(2 * spec.devices)
  times = {time for kind in (Kind.F, Kind.I, Kind.W) for time in durations[kind]}
  return len(times) == 1 and not spec.costs.hop and not spec.costs.head
