"""`schedule=auto`: time and memory are weighed, and what does not fit is not chosen."""

import jax
import optax
import pytest
from networks import lm
from networks.drawn import drawn

import jaxpipe
from jaxpipe.pipeline.costs.layer_costs import counted_costs
from jaxpipe.training.chips import DeviceSpec
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.plan import plan
from jaxpipe.training.plan.choose import Candidate, _choose, choose_schedule

F32 = dict(dtype="float32", param_dtype="float32", dropout=0.0)


def weighed(limit, *rows):
  """The choice among (label, time, bytes), given fastest first."""
  bytes_of = {label: size for label, _, size in rows}
  schedules = [jaxpipe.make_schedule("1f1b", devices=1, microbatches=1 + i) for i in range(9)]
  sizes = {id(schedules[i]): bytes_of[label] for i, (label, _, _) in enumerate(rows)}
  candidates = [Candidate(label, schedules[i], time) for i, (label, time, _) in enumerate(rows)]
  return _choose(candidates, lambda schedule: sizes[id(schedule)], limit)


def test_of_equally_fast_schedules_the_leanest_is_chosen():
  choice = weighed(None, ("fast", 100, 50), ("lean", 102, 20), ("slow", 110, 1))
  assert choice.best.label == "lean"
  # What is slower than that was not even asked for its memory.
  assert [c.label for c in choice.candidates] == ["fast", "lean"]


def test_what_does_not_fit_is_passed_over():
  choice = weighed(30, ("fast", 100, 50), ("middle", 200, 40), ("fits", 300, 30), ("z", 301, 31))
  assert choice.best.label == "fits"
  assert str(choice).splitlines()[0].endswith("too large")
  assert weighed(10, ("fast", 100, 50)) is None


def where(**options):
  return lm.stack(4, **options), jaxpipe.make_mesh("stage:2"), lm.batch(8)


def test_a_limit_costs_time_and_is_kept():
  stack, mesh, batch = where(**F32)
  ask = lambda limit: choose_schedule(  # noqa: E731
    *(stack, mesh, batch), microbatches=4, optimizer=optax.adam(1e-3), memory_limit=limit
  )
  free = ask(None)
  assert free.best.time <= 1.03 * min(c.time for c in free.candidates)
  lean = jaxpipe.make_schedule("1f1b", devices=2, microbatches=4)
  report = jaxpipe.memory_report(stack, lean, mesh, batch, optimizer=optax.adam(1e-3))
  assert free.best.bytes > report.total
  bound = ask(report.total)
  assert bound.best.bytes <= report.total and bound.best.time > free.best.time
  with pytest.raises(ValueError, match=f"1f1b needs {report.total:,}"):
    ask(1000)


def test_the_chosen_schedule_runs_exactly(float64):
  stack, mesh, batch = where()
  choice = choose_schedule(stack, mesh, batch, microbatches=4)
  options = dict(params=drawn(stack), unroll="none")
  report = jaxpipe.check(stack, choice.schedule, mesh, batch, **options)
  assert report.ok, str(report)


def test_ticks_by_kind_are_weighed_once_each():
  stack, batch = lm.stack(16, **F32), lm.batch(8)
  choice = choose_schedule(stack, jaxpipe.make_mesh("stage:4"), batch, microbatches=8)
  assert any("by kind, V=4" in candidate.label for candidate in choice.candidates)
  alike = [(c.schedule.order, c.schedule.ticks) for c in choice.candidates]
  assert len(set(alike)) == len(alike)
  assert choice.best.time <= 1.03 * min(candidate.time for candidate in choice.candidates)


def test_counted_costs_are_those_of_matmuls():
  """Two FLOPs a weight and token in F, I and W; a tenth more for the rest of a wide layer."""
  stack = lm.stack(4, width=64, **F32)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), lm.batch(2))
  dots, full = (counted_costs(stack, shapes, 2, residuals) for residuals in ("dots", "full"))
  assert dots.forward == 1
  assert dots.weight_grad == pytest.approx(1, abs=0.15)
  assert 1 < dots.input_grad < 1.5
  # The stage's forward runs again before its backward.
  assert full.input_grad == pytest.approx(dots.input_grad + 1)


def test_what_a_device_has_is_the_limit_of_a_run(make_config, tmp_path, monkeypatch):
  """Only --memory_limit was a limit, although a device says what it has."""
  small = DeviceSpec("a small one", memory=1000, peak=None, clock=None)
  monkeypatch.setattr(plan.DeviceSpec, "of", lambda devices: small)
  with pytest.raises(ConfigError, match="no schedule fits a memory_limit of 1,000 bytes"):
    build_run(make_config(tmp_path, schedule="auto", microbatches=2, mesh="stage:2"))


def test_sizes_are_checked_before_any_text_is_read(make_config, tmp_path):
  config = make_config(tmp_path, schedule="auto", layers=5, text="/no/such/text")
  with pytest.raises(ConfigError, match="5 layers cannot fill 4 stages evenly"):
    build_run(config)
