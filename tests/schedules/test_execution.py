"""Three models of execution, links and further costs, against timetables worked out by hand."""

import pytest

from jaxpipe.schedules import Costs, Schedule, make_schedule, simulate
from jaxpipe.schedules.ticks import ticks


def _read(*rows, **more):
  return Schedule.from_tokens([row.split() for row in rows], **more)


def test_ticks_of_1f1b():
  schedule = make_schedule("1f1b", devices=2, microbatches=2)
  # device 0: F0 F1 B0 B1, device 1: F0 B0 F1 B1
  assert ticks(schedule) == ((0, 1, 3, 5), (1, 2, 3, 4))
  assert ticks(schedule, slack=1) == ((0, 1, 5, 7), (2, 3, 4, 5))


def test_barrier_makes_every_tick_as_long_as_its_longest_action():
  schedule = make_schedule("1f1b", devices=2, microbatches=2)
  timeline = simulate(schedule, Costs(1, 1, 1), execution="barrier")
  # tick:      0 1   2     3         4     5
  # device 0:  F F   -     B(2)      -     B(2)
  # device 1:  - F   B(2)  F         B(2)  -
  assert timeline.start == ((0, 1, 4, 8), (1, 2, 4, 6))
  assert timeline.makespan == 10
  # Every tick but the last ends with an exchange.
  late = simulate(schedule, Costs(1, 1, 1, hop=10), execution="barrier")
  assert late.makespan == 10 + 5 * 10


def test_coupled_waits_for_those_it_exchanges_with_only():
  schedule = make_schedule("1f1b", devices=3, microbatches=2)
  costs = Costs((9, 1, 1), 1, 1)
  free = simulate(schedule, costs)
  coupled = simulate(schedule, costs, execution="coupled")
  barrier = simulate(schedule, costs, execution="barrier")
  # Device 0's second forward ends at 18; it holds up device 1's next tick, and through it device 2.
  assert coupled.start[0][:2] == (0, 9)
  assert coupled.start[1][0] == 9
  assert coupled.start[2] == (10, 19, 21, 23) and free.start[2] == (10, 11, 19, 20)
  assert free.makespan <= coupled.makespan <= barrier.makespan


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("P, M", [(1, 3), (2, 5), (4, 4), (5, 9)])
def test_models_agree_where_every_action_takes_as_long(name, P, M):
  schedule = make_schedule(name, devices=P, microbatches=M, backward="split")
  costs = Costs(3, 3, 3)
  free = simulate(schedule, costs)
  for execution in ("barrier", "coupled"):
    assert simulate(schedule, costs, execution=execution).start == free.start


def test_slack_lets_neighbours_run_ahead():
  """1F1B loses to waiting when B = 2F; a tick of slack wins some back, GPipe loses nothing."""
  costs = Costs(1, 1, 1)
  sizes = {"devices": 4, "microbatches": 32}
  for name, loses in (("1f1b", True), ("gpipe", False)):
    schedule = make_schedule(name, **sizes)
    free, tight = simulate(schedule, costs), simulate(schedule, costs, execution="coupled")
    assert (tight.makespan > free.makespan) is loses
    slack = simulate(schedule, costs, execution="coupled", slack=1)
    assert (slack.makespan < tight.makespan) is loses


def test_a_tick_of_slack_hides_a_hop_that_is_no_longer_than_an_action():
  schedule = make_schedule("gpipe", devices=2, microbatches=8)
  tight = simulate(schedule, Costs(4, 2, 2, hop=4), execution="coupled")
  slack = simulate(schedule, Costs(4, 2, 2, hop=4), execution="coupled", slack=1)
  # Device 0 begins its first ticks at 0, 4, 16, 20, 32, 36: 16 for two of them, work 8.
  assert tight.start[0][:6] == (0, 4, 16, 20, 32, 36)
  # 8 ticks of work, twice, and two of filling each way.
  assert slack.makespan == 20 * 4


def test_a_link_carries_one_transfer_at_a_time():
  schedule = make_schedule("gpipe", devices=2, microbatches=3)
  apart = simulate(schedule, Costs(1, 1, 1, hop=5))
  queued = simulate(schedule, Costs(1, 1, 1, hop=5, hop_occupies_link=True))
  assert apart.start[1][:3] == (6, 7, 8)
  # They leave device 0 at 1, 2 and 3, and the link takes 5 for each.
  assert queued.start[1][:3] == (6, 11, 16)
  # Backwards are sent at 19, 21 and 23 over the other direction.
  assert queued.start[0][3:] == (24, 29, 34)


def test_the_head_adds_to_the_last_stage_only():
  fused = make_schedule("gpipe", devices=2, microbatches=1)
  split = make_schedule("gpipe", devices=2, microbatches=1, backward="split")
  for schedule, makespan in ((fused, 1 + 11 + 25 + 5), (split, 1 + 11 + 12 + 13)):
    timeline = simulate(schedule, Costs(1, 2, 3, head=10))
    assert timeline.busy == (6, 36)
    assert timeline.makespan == makespan


def test_vocabulary_passes_share_the_head():
  one = _read("0F0 0S0 0B0 0T0", "1F0 1S0 1B0 1T0")
  assert one.vocabulary == 1
  timeline = simulate(one, Costs(1, 1, 1, head=6))
  # Device 1: F 1-2; S waits for the broadcast and takes 2/2 of the head: 2-8; B 8-10.
  assert timeline.start == ((0, 2, 10, 12), (1, 2, 8, 10))
  two = _read("0F0 0S0 0T0 0B0", "1F0 1S0 1T0 1B0", vocabulary=2)
  timeline = simulate(two, Costs(1, 1, 1, head=6))
  assert timeline.start == ((0, 2, 5, 13), (1, 2, 5, 11))


def test_an_overlapped_pair_starts_with_both_inputs_and_ends_at_once():
  rows = ["0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1"]
  timeline = simulate(_read(*rows), Costs(2, 2, 2, overlap=0.5))
  assert timeline.start[1] == (2, 4, 7)
  assert timeline.end[1] == (4, 7, 11)
  assert timeline.start[0][2] == 7
  assert timeline.peak_activations == (2, 2)


def test_recompute_has_its_own_time_and_memory():
  schedule = _read("0F0 0R0 0B0")
  timeline = simulate(schedule, Costs(5, 1, 1, recompute=3), (1, 0, -4, 3))
  assert timeline.start == ((0, 5, 8),)
  assert timeline.peak_memory == (4,)
  assert simulate(schedule, Costs(5, 1, 1)).start == ((0, 5, 10),)


def test_fillers_gathers_and_updates_take_their_time():
  schedule = _read("0G0 0F0 0Y0 1Y0 0B0 0X0 0U0")
  timeline = simulate(schedule, Costs(1, 1, 1, filler=(2, 3), gather=4, update=7))
  assert timeline.start == ((0, 4, 5, 7, 10, 12, 12),)
  assert timeline.makespan == 19
  with pytest.raises(ValueError, match="filler lists 3 stages, the schedule has 2"):
    simulate(schedule, Costs(filler=(1, 2, 3)))


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"execution": "magic"}, "unknown execution 'magic'; known: free, barrier, coupled"),
    ({"slack": 1}, "slack=1 needs 0 or more ticks, and execution='coupled'"),
    ({"execution": "coupled", "slack": -1}, "slack=-1 needs 0 or more"),
    ({"memory": (1, 0)}, r"memory has 2 changes, not 3 \(F, I, W\) or 4"),
  ],
)
def test_refusals(arguments, message):
  with pytest.raises(ValueError, match=message):
    simulate(make_schedule("gpipe", devices=2, microbatches=2), **arguments)
