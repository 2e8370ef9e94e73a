"""Placements: which device holds which stage."""

import pytest

from jaxpipe.schedules import Placement, Schedule, ScheduleError


@pytest.mark.parametrize(
  "placement, table",
  [
    (Placement.loop(3), [[0], [1], [2]]),
    (Placement.loop(2, 3), [[0, 2, 4], [1, 3, 5]]),
    (Placement.v(3), [[0, 5], [1, 4], [2, 3]]),
    (Placement([[1, 0], [3, 2]]), [[1, 0], [3, 2]]),
  ],
)
def test_table_and_its_inverse(placement, table):
  assert [list(row) for row in placement.table] == table
  assert (placement.devices, placement.chunks) == (len(table), len(table[0]))
  assert placement.stages == len(table) * len(table[0])
  for d, row in enumerate(table):
    for v, stage in enumerate(row):
      assert placement.stage(d, v) == stage
      assert (placement.device(stage), placement.chunk(d, stage)) == (d, v)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Placement([]), "at least one device"),
    (lambda: Placement([[0, 1], [2]]), "device 1 holds 1 stages and device 0 holds 2"),
    (lambda: Placement([[0], [2]]), r"no device holds stage 1, although stage 2 exists: \[\[0\], "),
    (lambda: Placement.v(4, 3), "2 chunks on every device, not 3; use chunks=2"),
    (lambda: Placement.named("spiral", 2, 2), "unknown placement 'spiral'; known: loop, v, wave"),
  ],
)
def test_refusals(make, message):
  with pytest.raises(ScheduleError, match=message):
    make()


def test_equal_tables_are_equal_whatever_their_names():
  assert Placement([[0], [1]]) == Placement.loop(2)
  assert len({Placement([[0], [1]]), Placement.loop(2), Placement([[1], [0]])}) == 2


@pytest.mark.parametrize(
  "rows, name",
  [
    (["0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"], "loop"),
    (["0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0"], "v"),
    (["1F0 1B0", "0F0 0B0"], "table"),
  ],
)
def test_read_off_the_rows(rows, name):
  placement = Schedule.from_tokens([row.split() for row in rows], "rows").placement
  assert placement.name == name


def test_one_misplaced_action_does_not_move_its_stage():
  with pytest.raises(ScheduleError, match="1B0 on device 0 is misplaced: stage 1 lives on device"):
    Schedule.from_tokens([["0F0", "0B0", "1B0"], ["1F0", "1I1", "1F1"]], "rows")
