"""Replicas, paths, pairs and the kinds beside the passes: what is legal, what is said if not."""

import pytest

from jaxpipe.schedules import (
  Placement,
  Schedule,
  ScheduleError,
  from_csv,
  from_json,
  simulate,
  to_csv,
  to_json,
)
from jaxpipe.schedules.actions import Overlap, parse_step


def _read(*rows, **more):
  return Schedule.from_tokens([row.split() for row in rows], **more)


MIRRORED = ["0F0 1F1 1B1 0B0", "0F1 1F0 1B0 0B1"]
PAIRED = ["0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1"]
SKIPPING = ["0F0 0F1 0B0 0B1", "1F0 1B0", "2F1 2F0 2B1 2B0"]
PATHS = [[0, 1, 2], [0, 2]]
VOCABULARY = ["0F0 0S0 0B0 0T0", "1F0 1S0 1B0 1T0"]


def test_placements_in_waves_and_mirrors():
  assert Placement.wave(2, 4).table == ((0, 3, 4, 7), (1, 2, 5, 6))
  assert Placement.wave(3, 2) == Placement.v(3)
  assert Placement.mirrored(4).table == ((0, 3), (1, 2), (2, 1), (3, 0))
  # BitPipe's: a V down on even chunks, a V up on odd ones.
  assert Placement.mirrored(2, 4).table == ((0, 1, 3, 2), (1, 0, 2, 3))
  mirrored = Placement.mirrored(4)
  assert (mirrored.stages, mirrored.homes(1)) == (4, (1, 2))
  assert mirrored.chunk(2, 1) == 1
  with pytest.raises(ScheduleError, match=r"stage 1 lives on devices \(1, 2\)"):
    mirrored.device(1)
  with pytest.raises(ScheduleError, match="not 3 devices with 2 chunks; use devices=4, chunks=2"):
    Placement.mirrored(3)
  with pytest.raises(ScheduleError, match=r"device 0 holds a stage twice: \[0, 0\]"):
    Placement([[0, 0], [1, 1]])


def test_each_microbatch_stays_with_one_replica():
  schedule = _read(*MIRRORED, placement="mirrored")
  timeline = simulate(schedule)
  assert timeline.start == ((0, 1, 2, 4), (0, 1, 2, 4))
  assert _read(*MIRRORED, placement="rows").placement.name == "mirrored"
  with pytest.raises(ScheduleError) as caught:
    _read("0F0 1F1 1B1", "0F1 1F0 1B0 0B1 0B0", placement="mirrored")
  assert str(caught.value) == (
    "0B0 on device 1 is misplaced: device 0 runs 0F0 and keeps what it needs"
  )


def test_named_placements_count_replicas():
  assert _read(*MIRRORED, placement="mirrored").placement == Placement.mirrored(2)
  assert Placement.named("mirrored", 4, 8) == Placement.mirrored(4, 4)


def test_pairs():
  pair = parse_step(" (1F1;1B0)OVERLAP_F_B ")
  assert isinstance(pair, Overlap) and str(pair) == "(1F1;1B0)OVERLAP_F_B"
  assert _read(*PAIRED).tokens()[1] == PAIRED[1].split()
  with pytest.raises(ScheduleError, match="overlaps what is not a forward and a backward"):
    parse_step("(1B1;1F0)OVERLAP_F_B")
  with pytest.raises(ScheduleError, match=r"1F0;1B0\)OVERLAP_F_B on device 1 waits for \(1F0;1B0"):
    _read("0F0 0B0", "(1F0;1B0)OVERLAP_F_B")
  with pytest.raises(ScheduleError, match="1F1 on device 1 is a duplicate"):
    _read("0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1F1 1B1")


def test_paths():
  schedule = _read(*SKIPPING, paths=PATHS)
  assert simulate(schedule).end[0] == (1, 2, 12, 14)
  with pytest.raises(ScheduleError, match=r"1F1 is missing on device 1"):
    _read(*SKIPPING)
  with pytest.raises(ScheduleError, match="1F0 on device 1 is misplaced: microbatch 0 leaves"):
    _read(*SKIPPING, paths=[[0, 2], [0, 2]])
  with pytest.raises(ScheduleError, match="1 paths for 2 microbatches"):
    _read(*SKIPPING, paths=[[0, 1, 2]])
  with pytest.raises(ScheduleError, match=r"microbatch 1 cannot take the path \[0, 3\]"):
    _read(*SKIPPING, paths=[[0, 1, 2], [0, 3]])


def test_a_path_may_reorder_stages():
  schedule = _read("0F0 0B0", "1F0 1B0", "2F0 2B0", paths=[[0, 2, 1]])
  assert simulate(schedule).start == ((0, 7), (2, 3), (1, 5))


@pytest.mark.parametrize(
  "rows, message",
  [
    (["0F0 0S0 0B0 0T0", "1F0 1S0 1B0"], "1T0 is missing on device 1: every device runs its"),
    (["0F0 1S0 0B0 0T0", "1F0 1S0 1B0 1T0"], "1S0 on device 0 is misplaced: shard 1 of the"),
    (["0F0 0S0 0B0 0T0", "1F0 1B0 1S0 1T0"], "1B0 on device 1 waits for 1S0, which stands later"),
    (["0F0 0T0 0S0 0B0", "1F0 1S0 1B0 1T0"], "0T0 on device 0 waits for 0S0"),
    (["0F0 0S0 0B0 0T0 0S0", "1F0 1S0 1B0 1T0"], "0S0 on device 0 is a duplicate"),
    (["0G0 0F0 0X0 0B0", "1F0 1B0"], "0B0 on device 0 runs without its weights; put 0G before it"),
    (["0G0 0F0 0B0", "1G0 1F0 1B0 1X0"], "0G0 on device 0 is never released"),
    (["0G0 0F0 0G0 0B0 0X0", "1F0 1B0"], "0G0 on device 0 is a duplicate of the work of 0G0"),
    (["0F0 0B0 0X0", "1F0 1B0"], "0F0 on device 0 runs without its weights"),
    (["0F0 0B0 1Y0", "1F0 1B0"], "0Y0 is missing: frozen layer 0 needs every microbatch"),
    (["0F0 0B0 0Y0", "1F0 1B0 0Y0"], "0Y0 on device 1 is a duplicate: device 0 runs it already"),
    (["0F0 0B0 0Y1", "1F0 1B0"], "0Y1 on device 0 is beyond the last of 1 microbatches"),
    (["0F0 0U0 0B0", "1F0 1B0 1U0"], "0U0 on device 0 is misplaced: it stands before 0B0"),
    (["0F0 0B0 0U1", "1U1 1F0 1B0"], "0U1 on device 0 is misplaced: it stands after 0B0"),
    (["0F0 0B0 0U0", "1F0 1B0"], "1U0 must stand once; the other stages have one"),
    (["0F0 0B0 0U2", "1F0 1B0"], r"0U2 on device 0 is neither a step \(U0\) nor a validation"),
  ],
)
def test_refusals(rows, message):
  with pytest.raises(ScheduleError, match=message):
    _read(*rows)


def test_weight_gradients_need_no_weights():
  assert _read("0G0 0F0 0I0 0X0 0W0", "1F0 1B0".replace("1F0", "1G0 1F0") + " 1X0")


def test_optimizer_steps_go_down_the_stages_and_validations_up():
  schedule = _read("0U1 0F0 0B0 0U0", "1U1 1F0 1B0 1U0")
  timeline = simulate(schedule, update_costs(2))
  # Validation: device 1 first. Step: device 0 first, although device 1 is ready before it.
  assert timeline.start == ((2, 4, 8, 10), (0, 5, 6, 12))


def update_costs(update):
  from jaxpipe.schedules import Costs

  return Costs(1, 1, 1, update=update)


@pytest.mark.parametrize(
  "rows, more",
  [(MIRRORED, {"placement": "mirrored"}), (PAIRED, {}), (SKIPPING, {"paths": PATHS})]
  + [(VOCABULARY, {"vocabulary": barriers}) for barriers in (1,)],
)
def test_round_trips(rows, more):
  schedule = _read(*rows, **more)
  assert from_json(to_json(simulate(schedule))) == schedule
  if "paths" not in more:  # PyTorch's CSV has no words for them
    assert from_csv(to_csv(schedule)) == schedule
