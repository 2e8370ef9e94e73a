"""Messages that keep their order: which schedules would stand still."""

import pytest

from jaxpipe.schedules import Schedule, ScheduleError, check_sends, make_schedule


def _read(*rows):
  return Schedule.from_tokens([row.split() for row in rows])


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_named_schedules_send_in_the_order_of_need(name):
  check_sends(make_schedule(name, devices=4, microbatches=6))


def test_a_receiver_that_wants_the_second_message_first():
  # Legal, and it runs where messages may overtake each other.
  schedule = _read("0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1")
  with pytest.raises(ScheduleError) as caught:
    check_sends(schedule)
  assert str(caught.value) == (
    "1F1 on device 1 waits for 0F1, but device 0 sends 0F0 before it; with ordered sends both"
    " stand still"
  )


def test_two_devices_that_send_to_each_other_first():
  schedule = make_schedule("1f1b", devices=2, microbatches=2)
  check_sends(schedule)
  with pytest.raises(ScheduleError) as caught:
    check_sends(schedule, "rendezvous")
  assert str(caught.value) == (
    "device 0 sends 0F1 while device 1 sends 1B0: where a send waits for its receive none goes on;"
    " exchange both ways in one call"
  )


def test_gpipe_never_sends_both_ways_at_once():
  check_sends(make_schedule("gpipe", devices=4, microbatches=3), "rendezvous")


def test_unknown_word():
  with pytest.raises(ValueError, match="unknown sends 'eager'; known: ordered, rendezvous"):
    check_sends(make_schedule("gpipe", devices=1, microbatches=1), "eager")
