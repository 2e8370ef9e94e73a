"""Loops and straight lines: the same ticks in the same order, and what each may leave out."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import lm
from networks.drawn import drawn, placed_shapes

import jaxpipe
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.program import Doing
from jaxpipe.pipeline.table.segment import Segment
from jaxpipe.pipeline.table.tick_times import estimated_time, tick_durations, tick_times
from jaxpipe.pipeline.table.unroll import SHAPES, _loops, segments

NAMES = ["gpipe", "1f1b", "zb-h1", "zb-v", "chimera", "zeropp"]


def program(name="1f1b", P=4, M=8, **options):
  return lower(jaxpipe.make_schedule(name, devices=P, microbatches=M), **options)


def walked(parts):
  """Ticks in the order in which they run."""
  return [tick for one in parts for tick in range(one.start, one.stop)]


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 12))
def test_loops_cover_every_tick_once_and_have_the_period_that_they_say(period, repeats):
  ids = [*period, *[7, 8, 9] * repeats, *period, *[5] * repeats]
  found = list(_loops(np.array(ids), 0))
  assert walked(found) == list(range(len(ids)))
  for one in found:
    body = ids[one.start : one.start + one.period]
    assert ids[one.start : one.stop] == body * one.repeats


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slack", [0, 1])
def test_each_shape_walks_every_tick_and_leaves_out_nothing(name, slack):
  it = program(name, slack=slack)
  for shape in SHAPES:
    found = segments(it, shape)
    assert walked(found) == list(range(it.ticks))
    for one in found:
      bodies = one.bodies(it.doing)
      for tick in range(one.start, one.stop):
        body = bodies[(tick - one.start) % one.period]
        assert Doing.any_of([body, it.doing[tick]]) == body


@pytest.mark.parametrize("name", NAMES)
def test_ends_compiles_exactly_what_each_tick_does(name):
  it = program(name, M=24)
  for one in segments(it, "ends"):
    bodies = one.bodies(it.doing)
    assert [bodies[i % one.period] for i in range(one.stop - one.start)] == list(
      it.doing[one.start : one.stop]
    )


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "v-min", "hanayo", "dualpipe"])
def test_loops_do_not_grow_with_the_number_of_microbatches(name):
  size = lambda M: sum(one.period for one in segments(program(name, M=M), "ends"))  # noqa: E731
  assert size(16) == size(64) == size(128)


def test_exchanges_are_those_that_carry_something():
  it = program("1f1b", P=3, M=4)
  sent = sum(
    len(pairs)
    for one in segments(it, "all")
    for doing in one.bodies(it.doing)
    for pairs in doing.pairs
  )
  assert sent == 2 * 4 * (3 - 1)  # y forwards and dx backwards, over each boundary


def test_1f1b_waits_a_quarter_longer_where_every_tick_exchanges_both_ways():
  """F of 1 and B of 2 couple neighbours; sends where something is sent make it the schedule."""
  it = program("1f1b", P=4, M=32)
  assert estimated_time(it, segments(it, "ends")) == jaxpipe.simulate(it.schedule).makespan == 105
  assert estimated_time(it, segments(it, "none")) == 136


@pytest.mark.parametrize(
  ("name", "M", "chosen"), [("gpipe", 32, "none"), ("zb-h1", 32, "none"), ("1f1b", 32, "ends")]
)
def test_auto_takes_the_smallest_program_that_is_as_fast(name, M, chosen):
  it = program(name, M=M)
  assert segments(it, "auto") == segments(it, chosen)


def test_auto_compiles_no_long_straight_line():
  """Nothing repeats in it, and straight lines of hundreds of ticks take minutes to compile."""
  it = program("interleaved-1f1b", P=8, M=32)
  assert sum(one.period for one in segments(it, "ends")) > 64
  assert segments(it, "auto") == (Segment(0, 1, it.ticks),)


def test_a_sender_that_blocks_waits_for_a_slower_receiver():
  """Device 0 makes y of 1 and then has nothing to wait for, but device 1 is at work for 5."""
  schedule = jaxpipe.Schedule.from_tokens(
    [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
  )
  it = lower(schedule)
  durations = tick_durations(it, jaxpipe.Costs([1, 5], 1, 0))
  begins = {
    b: tick_times(it, segments(it, "all"), durations, 0, blocking=b)[0] for b in (False, True)
  }
  # Its second F is done at 2; what it sends then is taken at 6, when the receiver's first F ends.
  assert begins[False][:3, 0].tolist() == [0, 1, 2]
  assert begins[True][:3, 0].tolist() == [0, 1, 6]


def test_another_shape_is_refused():
  with pytest.raises(ValueError, match="unroll='some' is unknown; use auto, none, ends, all"):
    segments(program(), "some")


def lowered(M, unroll):
  """The program that XLA is given."""
  stack, batch = lm.stack(2), lm.batch(M)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=M)
  mesh = jaxpipe.make_mesh("stage:2")
  params = placed_shapes(stack, schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll=unroll)
  return jax.jit(step).lower(params, batch, jax.random.key(0)).as_text()


def test_programs_differ_in_their_exchanges(float64):
  """Ticks of 1f1b with P=2, M=8: one loop; 2 + 2 + 2 of 16; 16, of which 14 exchange."""
  sends = {unroll: lowered(8, unroll).count("collective_permute") for unroll in SHAPES}
  assert sends["none"] < sends["ends"] < sends["all"]


@pytest.mark.parametrize("unroll", ["none", "ends"])
def test_the_program_does_not_grow_with_the_number_of_microbatches(float64, unroll):
  few, many = (len(lowered(M, unroll).splitlines()) for M in (8, 64))
  assert few == many


def test_shapes_agree_to_the_last_bit(float64):
  """The same sums in the same order: nothing but the program's size may differ."""
  stack, batch = lm.stack(2), lm.batch(3)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=3)
  mesh = jaxpipe.make_mesh("stage:2")
  params = jaxpipe.place(drawn(stack), stack, schedule, mesh)
  results = [
    jax.device_get(
      jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll=unroll, poison=True)(
        params, batch, jax.random.key(1)
      )
    )
    for unroll in SHAPES
  ]
  for a, b in itertools.pairwise(results):
    assert all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
