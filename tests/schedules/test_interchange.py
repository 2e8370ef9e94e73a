"""Files in both directions."""

import pytest

from jaxpipe.schedules import Schedule, ScheduleError, from_csv, from_json, to_csv

V_SHAPED = "0F0,3F0,3I0,3W0,0B0\n1F0,2F0,2B0,1B0\n"


def test_csv_keeps_placement_and_split():
  schedule = from_csv(V_SHAPED)
  assert to_csv(schedule) == V_SHAPED
  assert schedule.placement.name == "v"


def test_csv_may_idle_and_end_in_empty_rows():
  idling = ",0F0, 3F0,3I0,,3W0,0B0,\r\n,,1F0,2F0,2B0,1B0\r\n\r\n"
  assert from_csv(idling) == from_csv(V_SHAPED)


def test_csv_under_a_placement_that_it_does_not_have():
  with pytest.raises(
    ScheduleError, match="3F0 on device 0 is misplaced: stage 3 lives on device 1"
  ):
    from_csv(V_SHAPED, "loop")


@pytest.mark.parametrize(
  "text, message",
  [("{", "not JSON"), ("[]", 'no field "order"'), ('{"order": [["0F0"]]}', "0B0 .* is missing")],
)
def test_json_that_is_no_schedule(text, message):
  with pytest.raises(ScheduleError, match=message):
    from_json(text)


def test_json_needs_an_order_only():
  assert from_json('{"order": [["0F0", "0B0"]]}') == Schedule.from_tokens([["0F0", "0B0"]])
