"""What the clock readings may not contradict, that they change no result, and costs from them."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import lm

import jaxpipe
from jaxpipe.pipeline import timeline
from jaxpipe.pipeline.device.probe import Clock
from jaxpipe.pipeline.executor import compile_step
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.tick_times import tick_durations, tick_times
from jaxpipe.pipeline.table.unroll import SHAPES, segments
from jaxpipe.pipeline.timeline import Measured, mean_costs, measure
from jaxpipe.schedules import Costs, Kind, simulate
from jaxpipe.schedules.drawing.text import draw_traces

F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32, attention=jax.nn.dot_product_attention)
# name -> axes beside two stages, and what goes to the step: fused backwards and a second device per
# stage; I and W, and transfers that take a tick; a V, and pairs that become two actions.
CASES = {
  "1f1b": (",data:2", {"residuals": "full", "unroll": "ends"}),
  "zb-h1": ("", {"slack": 1, "unroll": "none"}),
  "dualpipe-v": ("", {"unroll": "none"}),
}


def build(name):
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=4)
  mesh = jaxpipe.make_mesh(f"stage:2{CASES[name][0]}")
  stack = lm.stack(layers=schedule.stages, dropout=0.0, **F32)
  batch = lm.batch(8)
  return (stack, schedule, mesh), stack.init(jax.random.key(0), batch, schedule, mesh), batch


@pytest.fixture(scope="module", params=CASES)
def run(request):
  """A measured step; and what the two programs returned, without a probe and with one."""
  where, params, batch = build(request.param)
  returned = {}

  def noting(execution, unroll):
    step, probed = compile_step(execution, unroll), execution.probe is not None

    def call(*args):
      returned[probed] = step(*args)
      return returned[probed]

    return call

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timeline, "compile_step", noting)
    return measure(*where, params, batch, steps=1, **CASES[request.param][1]), returned


@pytest.fixture
def measured(run):
  return run[0]


def when(times):
  """Action -> device, start and end."""
  return {
    action: (d, start, end)
    for d, row in enumerate(times.schedule.order)
    for action, start, end in zip(row, times.start[d], times.end[d], strict=True)
  }


def needs(action, at, last):
  """The actions whose products an action waits for."""
  s, m = action.stage, action.microbatch
  made = lambda kind, s: [  # noqa: E731
    a for k in (kind, Kind.B) if (a := jaxpipe.Action(s, k, m)) in at
  ]
  if action.kind is Kind.F:
    return made(Kind.F, s - 1)[:1] if s else []
  if action.kind is Kind.W:
    return made(Kind.I, s)
  return made(Kind.F, s)[:1] + (made(Kind.I, s + 1) if s < last else [])


def test_every_action_once_and_none_before_what_it_waits_for(measured):
  at = when(measured.timeline)
  schedule = measured.timeline.schedule
  asked = jaxpipe.make_schedule(schedule.name, devices=schedule.devices, microbatches=4)
  assert sorted(map(str, at)) == sorted(str(a) for r in asked.order for x in r for a in x.parts)
  starts = [start for _, start, _ in at.values()]
  assert min(starts) == 0 and len(set(starts)) == len(starts)  # no device shows another's readings
  for action, (_, start, end) in at.items():
    assert end > start
    for other in needs(action, at, schedule.stages - 1):
      assert at[other][2] < start, f"{action} began before {other} had ended"


def test_a_device_does_one_thing_at_a_time(measured):
  for starts, ends in zip(measured.timeline.start, measured.timeline.end, strict=True):
    assert len(starts) > 1
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))


def test_what_follows_from_the_times(measured):
  times, costs = measured.timeline, measured.costs
  work = sum(map(sum, costs.durations(times.schedule.stages).values()))
  assert 0 < measured.hop < times.makespan and work > 0 and measured.outside > 0
  # All the work is in the plan, however its parts were averaged.
  assert sum(measured.planned().busy) == pytest.approx(sum(times.busy))
  assert measured.replayed().busy == pytest.approx(times.busy)
  assert measured.predicted_step == measured.planned().makespan + measured.outside


def test_the_trace_holds_both(measured):
  timelines = {"planned": measured.planned(), "measured": measured.timeline}
  events = json.loads(draw_traces(timelines))["traceEvents"]
  names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
  assert names == {0: "planned", 1: "measured"}
  actions = when(measured.timeline)
  for process in names:
    slices = [e for e in events if e["ph"] == "X" and e["pid"] == process]
    assert sorted(e["name"] for e in slices) == sorted(map(str, actions))
    for event in slices:
      assert event["tid"] == actions[jaxpipe.Action.parse(event["name"])][0]


def test_the_clock_changes_no_result(run):
  _, returned = run
  assert set(returned) == {False, True}
  jax.tree.map(np.testing.assert_array_equal, returned[False], returned[True])


def test_without_a_probe_the_program_never_calls_the_host():
  where, params, batch = build("1f1b")
  step = jaxpipe.pipeline_value_and_grad(*where)
  assert "callback" not in str(jax.make_jaxpr(step)(params, batch))
  probed = jaxpipe.pipeline_value_and_grad(*where, probe=Clock(("stage",)))
  assert "io_callback" in str(jax.make_jaxpr(probed)(params, batch))


def test_a_reading_waits_for_all_that_an_action_leaves():
  """What it is given is what the tick ends with, gradients and pools too, not only what is sent."""
  where, params, batch = build("zb-h1")
  made = {}
  probe = lambda point, given, held: made.update({point: given}) or held  # noqa: E731
  jax.make_jaxpr(jaxpipe.pipeline_value_and_grad(*where, probe=probe))(params, batch)
  before, (after, _) = made[0], made[1]
  pairs = [(before.grads["layers"], after.grads["layers"]), (before.pools, after.pools)]
  for old, new in pairs:
    leaves = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    assert leaves and all(a is not b for a, b in leaves)


def test_no_steps():
  where, params, batch = build("1f1b")
  with pytest.raises(ValueError, match="steps=0 measure nothing; use 1 or more"):
    measure(*where, params, batch, steps=0)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-v", "hanayo"])
def test_costs_come_back_from_a_simulated_timeline(name):
  schedule = jaxpipe.make_schedule(name, devices=3, microbatches=5)
  rng = random.Random(name)
  F, I, W = ([rng.uniform(1, 9) for _ in range(schedule.stages)] for _ in range(3))
  costs = mean_costs(simulate(schedule, Costs(F, I, W)), hop=2.5)
  split = any(a.kind is Kind.W for row in schedule.order for a in row)
  assert costs.forward == pytest.approx(F) and costs.hop == 2.5
  assert np.add(costs.input_grad, costs.weight_grad) == pytest.approx(np.add(I, W))
  assert costs.weight_grad == (pytest.approx(W) if split else [0.0] * schedule.stages)


def test_stages_that_fuse_some_microbatches_only():
  schedule = jaxpipe.Schedule.from_tokens([["0F0", "0F1", "0B0", "0I1", "0W1"]])
  assert mean_costs(simulate(schedule, Costs(2, 3, 4))) == Costs([2], [3], [4], 0, recompute=[0])


@pytest.mark.parametrize("unroll", SHAPES)
@pytest.mark.parametrize("slack", [0, 1])
def test_plans_follow_the_shape_of_the_program(slack, unroll):
  schedule = jaxpipe.make_schedule("zb-h1", devices=3, microbatches=6)
  costs = Costs([1, 4, 2], [3, 2, 5], [2, 1, 3], 0.5)
  coupled = simulate(schedule, costs, execution="coupled", slack=slack)
  program = lower(schedule, slack=slack)
  shape = dict(program=program, segments=segments(program, unroll), blocking=False)
  m = Measured(timeline=coupled, hop=0.5, outside=7, step=1, **shape)
  planned, replayed = m.planned(), m.replayed()
  assert np.allclose(np.concatenate(planned.end), np.concatenate(replayed.end))
  assert m.predicted_step == planned.makespan + 7
  # One loop exchanges on every tick, as the simulator's model of one program does.
  if unroll == "none":
    assert np.allclose(np.concatenate(planned.start), np.concatenate(coupled.start))
  else:
    assert m.free().makespan <= planned.makespan < coupled.makespan


@pytest.mark.parametrize("unroll", SHAPES)
def test_the_hop_comes_back_from_planned_times(unroll):
  program = lower(jaxpipe.make_schedule("1f1b", devices=3, microbatches=6))
  parts = segments(program, unroll)
  durations = tick_durations(program, Costs([1, 4, 2], 3, 2))
  begins, ends = tick_times(program, parts, durations, hop=0.25)
  times = np.stack([begins[:-1], ends], axis=-1)
  assert timeline._hop(program, parts, times) == pytest.approx(0.25)


def test_gathers_of_cut_weights_are_measured_like_every_action():
  """The tick table was built without them where it was assembled a second time for the clock."""
  schedule = jaxpipe.make_schedule("zeropp", devices=2, microbatches=4, chunks=2)
  mesh = jaxpipe.make_mesh("stage:2,fsdp:2")
  stack, batch = lm.stack(layers=4, dropout=0.0, **F32), lm.batch(8)
  params = stack.init(jax.random.key(0), batch, schedule, mesh)
  measured = measure(stack, schedule, mesh, params, batch, steps=1, unroll="none")
  done, ends = measured.timeline.schedule, measured.timeline.end
  gathers = [action for row in done.order for action in row if action.kind is Kind.G]
  assert gathers and len(set(gathers)) < len(gathers)  # some of them stand twice in a list
  assert [len(row) for row in ends] == [len(row) for row in done.order]
  assert len(measured.costs.gather) == schedule.stages and min(measured.costs.gather) > 0
  durations = tick_durations(measured.program, measured.costs)
  busy = (durations > 0).sum()
  assert busy == sum(len(row) for row in done.order)
