"""Illegal schedules: one line that says which action, on which device, and what is wrong."""

import pytest

from jaxpipe.schedules import (
  Action,
  Placement,
  Schedule,
  ScheduleError,
  dependencies,
  make_schedule,
  simulate,
)

LEGAL = ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]


def _read(rows, placement="loop"):
  return Schedule.from_tokens([row.split() for row in rows], placement)


def test_what_an_action_waits_for():
  def needs(token):
    schedule = make_schedule("gpipe", devices=4, microbatches=6)
    return " ".join(map(str, dependencies(Action.parse(token), schedule)))

  assert needs("0F5") == ""
  assert needs("2F5") == "1F5"
  assert needs("2I5") == needs("2B5") == "2F5 3I5"
  assert needs("3I5") == needs("3B5") == "3F5"
  assert needs("0W5") == "0I5"
  assert needs("2R5") == "2F5"


@pytest.mark.parametrize(
  "rows",
  [
    LEGAL,
    ["0F0 0F1 0I0 0I1 0W1 0W0", "1F0 1I0 1F1 1I1 1W0 1W1"],
    ["0F0 0F1 0I0 0W0 0B1", "1F0 1B0 1F1 1I1 1W1"],  # one microbatch split, another not
    ["0F0 0F1 0R0 0B0 0B1", "1F0 1R0 1B0 1F1 1B1"],
    ["0F1 0F0 0B1 0B0", "1F1 1B1 1F0 1B0"],
  ],
)
def test_legal(rows):
  assert _read(rows).tokens() == [row.split() for row in rows]


@pytest.mark.parametrize(
  "rows, message",
  [
    # dead-locks
    (
      ["0F0 0F1 0B0 0B1", "1B0 1F0 1F1 1B1"],
      "1B0 on device 1 waits for 1F0, which stands later in the same list",
    ),
    (
      ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"],
      "0B0 on device 0 waits for 1B0, which stands behind 1F1 on device 1",
    ),
    (
      ["0B0 0F0", "1B0 1F0"],
      "0B0 on device 0 waits for 0F0, which stands later in the same list",
    ),
    (
      ["0F0 0W0 0I0", "1F0 1B0"],
      "0W0 on device 0 waits for 0I0, which stands later in the same list",
    ),
    (
      # Device 0, no further on in its list than device 1, is only stuck behind it.
      ["0F0 0F1 0B0 0B1", "1F0 1F1 1W0 1I0 1B1"],
      "1W0 on device 1 waits for 1I0, which stands later in the same list",
    ),
    (
      # Devices 0 and 1 are stuck behind device 2, where the mistake is.
      ["0F0 0B0", "1F0 1B0", "2B0 2F0"],
      "2B0 on device 2 waits for 2F0, which stands later in the same list",
    ),
    (
      ["0F0 0B0 0F1 0B1 2F0 2F1 2B0 2B1", "1F1 1F0 1B0 1B1 3F0 3B0 3F1 3B1"],
      "1F1 on device 1 waits for 0F1, which stands behind 0B0 on device 0",
    ),
    # missing
    (
      ["0F0 0F1 0B0 0B1", "1F0 1B0 1B1"],
      "1F1 is missing on device 1: 1B1 on device 1 waits for it",
    ),
    (
      ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1"],
      "1B1 (or 1I1 and 1W1) is missing on device 1: 0B1 on device 0 waits for it",
    ),
    (["0F0 0B0 0F1", "1F0 1B0 1F1 1B1"], "0B1 (or 0I1 and 0W1) is missing on device 0"),
    (["0F0 0I0", "1F0 1B0"], "0W0 is missing on device 0"),
    (["0F0 0W0", "1F0 1B0"], "0I0 is missing on device 0: 0W0 on device 0 waits for it"),
    (["", "1F0 1B0"], "0F0 is missing on device 0: 1F0 on device 1 waits for it"),
    # duplicate
    (["0F0 0F0 0B0", "1F0 1B0"], "0F0 on device 0 is a duplicate: device 0 runs it already"),
    (["0F0 0B0 0W0", "1F0 1B0"], "0W0 on device 0 is a duplicate of the work of 0B0"),
    (["0F0 0I0 0B0", "1F0 1B0"], "0B0 on device 0 is a duplicate of the work of 0I0"),
    # misplaced
    (["0F0 0B0 1F0", "1B0"], "1F0 on device 0 is misplaced: stage 1 lives on device 1"),
    (
      ["0F0 0B0 0R0", "1F0 1B0"],
      "0R0 on device 0 is misplaced: it comes after 0B0, which needs it",
    ),
    # unreadable
    (
      ["0F0 0B0", "1F0 1Z0"],
      "device 1: '1Z0' is not an action; write <stage><kind><microbatch> such as 3F0,"
      " with a kind out of F R I W B S T G X Y U",
    ),
    (
      ["0F0 0B0 2F0 2B0", "1F0 1B0"],
      "3 stages cannot fill 2 devices evenly; give one row of tokens per device and a multiple of"
      " that many stages",
    ),
    ([], "a schedule needs at least one action"),
  ],
)
def test_illegal(rows, message):
  with pytest.raises(ScheduleError) as caught:
    _read(rows)
  assert str(caught.value) == message


def test_a_schedule_built_by_hand_is_checked_on_request():
  order = _read(LEGAL).order
  with pytest.raises(ScheduleError, match="0F1 on device 0 is beyond the last of 1 microbatches"):
    Schedule("mine", Placement.loop(2), 1, order).check()
  with pytest.raises(ScheduleError, match="2 rows for 3 devices"):
    Schedule("mine", Placement.loop(3), 2, order).check()
  with pytest.raises(ScheduleError, match="1F0 on device 0 is misplaced: there are 1 stages"):
    Schedule("mine", Placement.loop(1), 2, ((Action.parse("1F0"),),)).check()


def test_simulating_an_unchecked_schedule_says_what_nobody_makes():
  order = _read(LEGAL).order
  headless = Schedule("mine", Placement.loop(2), 2, (order[0], order[1][1:]))
  with pytest.raises(ScheduleError, match="1B0 on device 1 waits for what no device makes"):
    simulate(headless)


def test_simulating_a_dead_lock_says_what_waits():
  stuck = Schedule("mine", Placement.loop(1), 1, (tuple(map(Action.parse, ["0B0", "0F0"])),))
  with pytest.raises(ScheduleError, match="0B0 on device 0 waits for 0F0"):
    simulate(stuck)


@pytest.mark.parametrize("token", ["", "F0", "0F", "0f0", "-1F0", "0F0 1F0", "0SEND_F0", "٣F0"])
def test_unreadable_tokens(token):
  with pytest.raises(ScheduleError, match="is not an action"):
    Action.parse(token)
