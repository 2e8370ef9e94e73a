"""Frozen layers in the bubbles of a partitioned backbone."""

import random

import pytest

from jaxpipe.schedules import Kind
from jaxpipe.schedules.partition import LayerCost, best
from jaxpipe.schedules.partition.frozen import best_filled, fill


def _backbone(seed=0, count=28):
  draw = random.Random(seed)
  times = [draw.randint(30, 120) for _ in range(count)]
  return [LayerCost(f"block {i}", t, t, t, 10, 5) for i, t in enumerate(times)]


def _encoders(total):
  """Many small layers and a few long ones that take `total` together, or nearly."""
  shares = [10] * 24 + [120, 200, 260, 260, 200, 160, 120, 60, 60]
  times = [round(x * total / sum(shares)) for x in shares]
  return [LayerCost(f"frozen {i}", t) for i, t in enumerate(times)]


def _work(timeline):
  return [a for row in timeline.schedule.order for a in row if a.kind is not Kind.Y]


@pytest.mark.parametrize(("devices", "microbatches"), [(4, 4), (4, 8), (8, 8), (8, 16)])
def test_frozen_layers_leave_less_than_five_percent_idle(devices, microbatches):
  backbone = _backbone()
  # Encoders that take two fifths of what the backbone's forward and backward take.
  encoders = _encoders(0.4 * sum(layer.time for layer in backbone))
  plan = best(backbone, "zb-h1", devices=devices, microbatches=microbatches)
  filled = fill(plan, encoders, overhead=2)
  assert plan.timeline.bubble > 0.1
  assert filled.bubble < 0.05
  assert filled.gain > 0.05
  assert filled.makespan < filled.separate


def test_the_backbone_is_not_delayed():
  plan = best(_backbone(), "1f1b", devices=4, microbatches=8)
  filled = fill(plan, _encoders(500))
  assert _work(filled.timeline) == _work(plan.timeline)
  assert filled.timeline.schedule.check()
  starts = {
    action: start
    for row, times in zip(filled.timeline.schedule.order, filled.timeline.start, strict=True)
    for action, start in zip(row, times, strict=True)
  }
  for row, times in zip(plan.timeline.schedule.order, plan.timeline.start, strict=True):
    for action, start in zip(row, times, strict=True):
      assert starts[action] == start


def test_every_microbatch_of_every_frozen_layer_runs():
  plan = best(_backbone(), "gpipe", devices=4, microbatches=4)
  encoders = _encoders(3000)
  filled = fill(plan, encoders, overhead=1)
  busy = sum(filled.timeline.busy) - sum(plan.timeline.busy)
  pieces = sum(filled.pieces)
  assert busy == pytest.approx(4 * (sum(layer.forward for layer in encoders) + pieces))


def test_long_layers_are_cut_where_bubbles_are_short():
  # Bubbles of 10 between the passes of 10 of the second device's stage; a frozen layer of 35.
  layers = [LayerCost("a", 10, 0, 20), LayerCost("b", 10, 0, 20)]
  plan = best(layers, "1f1b", devices=2, microbatches=2)
  frozen = [LayerCost("long", 35)]
  whole, cut = fill(plan, frozen, overhead=1_000), fill(plan, frozen)
  assert whole.pieces == (1,)
  assert cut.pieces[0] > 1
  assert cut.makespan < plan.makespan + 2 * 35


def test_too_little_frozen_work_leaves_what_any_filling_would():
  plan = best(_backbone(), "gpipe", devices=4, microbatches=4)
  filled = fill(plan, _encoders(100))
  assert filled.makespan == plan.makespan
  assert filled.bubble == pytest.approx(filled.least_bubble)
  assert 0 < filled.bubble < plan.timeline.bubble
  assert f"with any filling {filled.least_bubble:.1%} or more" in filled.report()


def test_the_shortest_filled_step_wins():
  backbone, encoders = _backbone(), _encoders(2_500)
  plans = [best(backbone, name, devices=4, microbatches=8) for name in ("gpipe", "1f1b", "zb-h1")]
  filled, table = best_filled(plans, encoders)
  steps = [fill(plan, encoders).makespan for plan in plans]
  assert filled.makespan == min(steps)
  assert [line.split()[0] for line in table.splitlines()] == ["schedule", "gpipe", "1f1b", "zb-h1"]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda plan: fill(plan, []), "0 frozen layers"),
    (lambda plan: fill(plan, [LayerCost("a", 1, 1, 1)]), "'a' is not frozen: its gradients take 2"),
    (lambda plan: best_filled([], [LayerCost("a", 1)]), "0 plans to fill"),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(best(_backbone(), "1f1b", devices=2, microbatches=2))
