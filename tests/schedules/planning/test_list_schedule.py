"""List scheduling: legal under any limit that one microbatch fits into, and true to its policy."""

import math
import random

import pytest

from jaxpipe.schedules import Costs, Kind, Placement, Schedule, ScheduleError, simulate
from jaxpipe.schedules.planning.list_schedule import Policy, all_work, list_schedule

PLACEMENTS = [
  Placement.v(1),
  Placement.v(3),
  Placement.loop(3, 3),
  Placement.loop(2, 4),
  # Four stages each: down, up, down, up.
  Placement(((0, 3, 4, 7), (1, 2, 5, 6))),
]


def _tokens(order):
  return [" ".join(map(str, row)) for row in order]


def _gradients_first(kind, stage, microbatch):
  return {Kind.F: 1000 + microbatch, Kind.I: microbatch, Kind.W: math.inf}[kind]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: f"{p.devices}x{p.chunks}")
@pytest.mark.parametrize("room", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_limit_dead_locks(placement, room, seed):
  """Random priorities under the tightest limits: the banker never lends too much."""
  draw = random.Random(seed)
  P, S, M = placement.devices, placement.stages, 6
  forward = [draw.randint(1, 4) for _ in range(S)]
  input_grad = [draw.randint(0, 2) for _ in range(S)]
  memory = (forward, input_grad, [-f - i for f, i in zip(forward, input_grad, strict=True)])
  least = max(
    sum(forward[s] for s in row) + max(input_grad[s] for s in row) for row in placement.table
  )
  urgent = {}
  policy = Policy(
    urgency=lambda kind, s, m: urgent.setdefault((kind, s, m), draw.random()),
    gap=draw.choice([0, 1]),
    patience=draw.choice([0, 2]),
  )
  costs = Costs(*([draw.randint(1, 5) for _ in range(S)] for _ in range(3)), hop=draw.randint(0, 2))
  order = list_schedule(
    placement, all_work(placement, M), policy, costs=costs, memory=memory, limit=least + room
  )
  timeline = simulate(Schedule("list", placement, M, order).check(), costs, memory)
  assert max(timeline.peak_memory) <= least + room
  assert len(order) == P


def test_what_it_plans_is_what_happens():
  """Times of the plan are the simulator's: nothing is left idle that could run."""
  placement, costs = Placement.v(2), Costs(3, 4, 2, 1)
  policy = Policy(urgency=_gradients_first)
  order = list_schedule(placement, all_work(placement, 2), policy, costs=costs)
  assert _tokens(order) == [
    "0F0 0F1 3F0 3I0 3F1 3I1 3W0 3W1 0I0 0W0 0I1 0W1",
    "1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 1W0 2W0 1W1 2W1",
  ]


def test_ranks_are_kept_and_those_that_cannot_be_are_refused():
  placement = Placement.loop(1, 2)
  work = all_work(placement, 2)

  def rank(kind, stage, microbatch):
    return 10 * (kind is Kind.I) + microbatch

  order = list_schedule(placement, work, Policy(urgency=_gradients_first, rank=rank))
  assert _tokens(order) == ["0F0 1F0 0F1 1F1 1I0 0I0 1I1 0I1 0W0 1W0 0W1 1W1"]
  with pytest.raises(ScheduleError, match="dead-lock"):
    list_schedule(placement, work, Policy(urgency=_gradients_first, rank=lambda kind, s, m: -s))
  with pytest.raises(ScheduleError, match="dead-lock"):
    list_schedule(placement, work, Policy(urgency=_gradients_first, rank=rank), limit=3)


def test_two_replicas_of_a_stage():
  """Each runs its own microbatches, and what they make stays on the way that they came."""
  placement = Placement(((0, 1), (1, 0)))
  work = [{0: [0, 2], 1: [1, 3]}, {1: [0, 2], 0: [1, 3]}]
  order = list_schedule(placement, work, Policy(urgency=_gradients_first))
  Schedule("both ways", placement, 4, order).check()
  assert {a.microbatch for a in order[0] if a.stage == 0} == {0, 2}


def test_bounds_of_a_policy():
  placement = Placement.loop(2)
  work = all_work(placement, 6)
  policy = Policy(urgency=lambda kind, s, m: (kind is not Kind.F, m), in_flight=[2, 1])
  timeline = simulate(Schedule("list", placement, 6, list_schedule(placement, work, policy)))
  assert timeline.peak_activations == (2, 1)
  policy = Policy(urgency=_gradients_first, pending=1)
  timeline = simulate(Schedule("list", placement, 6, list_schedule(placement, work, policy)))
  assert timeline.peak_pending_weight_grads == (1, 1)


def test_too_low_a_limit():
  placement = Placement.v(2)
  policy = Policy(urgency=_gradients_first)
  with pytest.raises(ValueError, match="use memory_limit=2 or more"):
    list_schedule(placement, all_work(placement, 1), policy, limit=1)
