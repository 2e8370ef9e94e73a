"""Panels: every timeline with all its actions, on one time axis."""

from jaxpipe.schedules import Costs, make_schedule, simulate
from jaxpipe.schedules.drawing.panels import draw_panels, scaled


def test_panels_share_a_time_axis_and_hold_every_action(tmp_path, monkeypatch):
  """The picture's own content, read back."""
  from matplotlib.figure import Figure

  seen = []
  monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.extend(figure.axes))
  schedule = make_schedule("zb-v", devices=2, microbatches=4)
  timelines = {n: simulate(schedule, Costs(x, x, x)) for n, x in (("plan", 2), ("run", 3))}
  draw_panels(timelines, tmp_path / "x.png")
  longest = timelines["run"].makespan
  for axes, (name, timeline) in zip(seen, timelines.items(), strict=True):
    assert axes.get_xlim() == (0, 1.01 * longest)
    assert axes.get_title("left").startswith(f"{name}: {timeline.makespan} ms, ")
    boxes = [(box.get_x(), box.get_x() + box.get_width()) for box in axes.patches]
    flat = [pair for row in zip(timeline.start, timeline.end) for pair in zip(*row)]  # noqa: B905
    assert boxes == flat
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == [str(action.microbatch) for row in schedule.order for action in row]


def test_panels_are_written_as_an_image(tmp_path):
  timeline = simulate(make_schedule("1f1b", devices=2, microbatches=2))
  draw_panels({"plan": timeline, "run": timeline}, tmp_path / "x.png")
  assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_another_unit_of_time():
  timeline = simulate(make_schedule("1f1b", devices=3, microbatches=4), Costs(1, 2, 3, 1))
  tenfold = simulate(make_schedule("1f1b", devices=3, microbatches=4), Costs(10, 20, 30, 10))
  assert scaled(timeline, 10) == tenfold
