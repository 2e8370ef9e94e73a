"""Drawings."""

import json
import struct

import pytest

from jaxpipe.schedules import (
  Costs,
  Schedule,
  draw_figure,
  draw_perfetto,
  draw_text,
  make_schedule,
  simulate,
)

V_SHAPED = [["0F0", "3F0", "3I0", "3W0", "0B0"], ["1F0", "2F0", "2B0", "1B0"]]


def test_text_names_stages_where_devices_hold_several():
  timeline = simulate(Schedule.from_tokens(V_SHAPED, "v", name="mine"), Costs(1, 1, 1, 0))
  assert draw_text(timeline).splitlines() == [
    "mine: 2 devices, 1 microbatch, 2 chunks each",
    "device 0 | 0F0         3F0 3I0 3W0             0B0---- | peak 2",
    "device 1 |     1F0 2F0         2B0---- 1B0----         | peak 2",
    "makespan 11  bubble 45.5 %  span 11  span bubble 45.5 %",
  ]


def test_text_breaks_rows_at_the_terminals_edge():
  timeline = simulate(make_schedule("1f1b", devices=3, microbatches=12), memory=(2, 0, -2))
  whole, broken = draw_text(timeline), draw_text(timeline, width=60)
  assert max(map(len, broken.splitlines())) <= 60 < max(map(len, whole.splitlines()))
  for d in range(3):
    (row,) = [line for line in whole.splitlines() if line.startswith(f"device {d}")]
    parts = [line for line in broken.splitlines() if line.startswith(f"device {d}")]
    assert len(parts) > 1
    assert "".join(p.split("| ", 1)[1] for p in parts).split() != []
    assert parts[-1].endswith(f"| peak {3 - d}, memory {6 - 2 * d}")
    assert row.endswith(f"| peak {3 - d}, memory {6 - 2 * d}")


@pytest.mark.parametrize("costs", [Costs(0.1, 0.37, 0.21, 0.05), Costs(18522, 18086, 9337, 601)])
def test_text_keeps_labels_whole_when_times_do_not_fall_on_columns(costs):
  schedule = make_schedule("1f1b", devices=4, microbatches=12, backward="split")
  for d, row in enumerate(draw_text(simulate(schedule, costs)).splitlines()[1:5]):
    cells = [cell.rstrip("-") for cell in row.split("|")[1].split()]
    assert cells == [token.removeprefix(str(d)) for token in schedule.tokens()[d]]


def test_text_stays_bounded_when_costs_are_far_apart():
  timeline = simulate(make_schedule("gpipe", devices=2, microbatches=2), Costs(1e-9, 1, 1, 0))
  assert len(draw_text(timeline)) < 100_000


def test_perfetto_tells_chunks_and_times():
  events = json.loads(draw_perfetto(simulate(Schedule.from_tokens(V_SHAPED, "v"))))["traceEvents"]
  (slice_,) = [event for event in events if event["name"] == "3I0"]
  assert (slice_["ph"], slice_["tid"], slice_["ts"], slice_["dur"]) == ("X", 0, 4000, 1000)
  assert slice_["args"] == {"stage": 3, "chunk": 1, "microbatch": 0}
  assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == [
    "device 0",
    "device 1",
  ]


@pytest.mark.parametrize(
  "timeline",
  [
    simulate(make_schedule("gpipe", devices=1, microbatches=1)),
    simulate(make_schedule("1f1b", devices=4, microbatches=8), memory=(1, 0.5, -1.5)),
    simulate(Schedule.from_tokens(V_SHAPED, "v")),
    simulate(make_schedule("1f1b", devices=2, microbatches=2), Costs(0, 0, 0, 0)),
  ],
  ids=["least", "memory", "chunks", "no time"],
)
def test_png_is_an_image_of_readable_size(timeline, tmp_path):
  draw_figure(timeline, tmp_path / "x.png")
  data = (tmp_path / "x.png").read_bytes()
  width, height = struct.unpack(">II", data[16:24])
  assert data.startswith(b"\x89PNG") and width > 900 and height > 250


def test_png_draws_every_action_with_its_microbatch(tmp_path, monkeypatch):
  """The picture's own content, read back as vector text."""
  from matplotlib.figure import Figure

  texts = []
  monkeypatch.setattr(
    Figure,
    "savefig",
    lambda figure, *_, **__: texts.extend(t.get_text().strip() for t in figure.axes[0].texts),
  )
  schedule = make_schedule("1f1b", devices=3, microbatches=4)
  draw_figure(simulate(schedule), tmp_path / "x.png")
  numbers = [str(action.microbatch) for row in schedule.order for action in row]
  assert texts == [*numbers, "3", "2", "1", "peak"]
