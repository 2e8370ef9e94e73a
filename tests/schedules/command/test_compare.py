"""The table of all schedules that fit."""

from jaxpipe.schedules import Costs, compare, make_schedule, simulate
from jaxpipe.schedules.command.compare import format_table


def _entries(**more):
  return compare(devices=4, microbatches=8, **more)


def test_best_first_and_with_the_simulators_figures():
  entries = _entries()
  ran = [entry for entry in entries if entry.timeline]
  whole = [e.timeline.makespan for e in ran if e.timeline.schedule.paths is None]
  assert whole == sorted(whole)
  # Skipping work is another matter.
  assert [e.timeline.schedule.paths is None for e in ran] == sorted(
    (e.timeline.schedule.paths is None for e in ran), reverse=True
  )
  by_label = {entry.label: entry.timeline for entry in ran}
  for name in ("gpipe", "1f1b"):
    expected = simulate(make_schedule(name, devices=4, microbatches=8))
    assert by_label[name].makespan == expected.makespan
  assert by_label["1f1b, split"].makespan < by_label["1f1b"].makespan


def test_every_schedule_does_the_same_work():
  for entry in _entries(costs=Costs(12, 12, 12)):
    # Weights of all replicas together pass every microbatch once; skipping skips work.
    if entry.timeline and entry.timeline.schedule.paths is None:
      assert sum(entry.timeline.busy) == 4 * 8 * 36, entry.label


def test_the_limit_counts_whole_devices_and_says_who_is_out():
  entries = _entries(memory_limit=4)
  fits = [entry for entry in entries if entry.timeline]
  assert all(max(entry.timeline.peak_memory) <= 4 for entry in fits)
  reasons = {entry.label: entry.reason for entry in entries if not entry.timeline}
  assert "above memory_limit=4; use memory_limit=8" in reasons["gpipe"]


def test_chunks_choose_the_families():
  labels = {entry.label for entry in _entries(chunks=1)}
  assert {"gpipe", "1f1b", "1f1b, split"} <= labels
  assert all(e.timeline.schedule.chunks == 1 for e in _entries(chunks=1) if e.timeline)


def test_table():
  lines = format_table(_entries(memory_limit=4)).splitlines()
  assert lines[0].split() == [
    *("schedule", "V", "makespan", "bubble", "span", "span", "bubble", "peak", "chunks", "memory")
  ]
  assert any(line.startswith("1f1b ") for line in lines)
  assert any(line.startswith("cannot run: gpipe: ") for line in lines)
