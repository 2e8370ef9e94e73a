"""Each rule against every cut there is, by its own objective."""

import itertools
import random
import statistics

import pytest

from jaxpipe.schedules import simulate
from jaxpipe.schedules.build import make_schedule
from jaxpipe.schedules.partition import (
  LayerCost,
  Partition,
  balanced,
  by_parameters,
  by_pattern,
  by_variance,
  cut,
  uniform,
)

CASES = range(300)


def _drawn(seed):
  draw = random.Random(seed)
  count, stages = draw.randint(1, 9), draw.randint(1, 5)
  high = draw.choice((2, 20))
  layers = [
    LayerCost(str(i), *(draw.randint(0, high) for _ in "FIW"), draw.randint(0, high))
    for i in range(count)
  ]
  return layers, stages


def _cuts(layers, stages):
  least = int(len(layers) >= stages)
  for inner in itertools.combinations_with_replacement(range(len(layers) + 1), stages - 1):
    sizes = [b - a for a, b in itertools.pairwise((0, *inner, len(layers)))]
    if min(sizes) >= least:
      yield Partition(layers=layers, sizes=sizes)


def _times(partition):
  return [stage.time for stage in partition.stages]


def _parameters(partition):
  return [stage.parameters for stage in partition.stages]


def _largest_then_variance(weights):
  return max(weights), round(statistics.pvariance(weights), 9)


OBJECTIVES = {
  balanced: lambda p: _largest_then_variance(_times(p)),
  by_variance: lambda p: round(statistics.pvariance(_times(p)), 9),
  by_parameters: lambda p: _largest_then_variance(_parameters(p)),
}


@pytest.mark.parametrize("rule", OBJECTIVES, ids=lambda rule: rule.__name__)
@pytest.mark.sampled("seed", CASES, 12)
def test_no_cut_is_better(rule, seed):
  layers, stages = _drawn(seed)
  objective = OBJECTIVES[rule]
  found = rule(layers, stages, empty=True)
  assert objective(found) == min(map(objective, _cuts(layers, stages)))
  assert min(found.sizes) >= int(len(layers) >= stages)


@pytest.mark.sampled("layers, stages", list(itertools.product(range(1, 14), range(1, 9))), 20)
def test_uniform_gives_the_first_stages_one_more(layers, stages):
  sizes = uniform([LayerCost("block")] * layers, stages, empty=True).sizes
  assert sizes == tuple(sorted(sizes, reverse=True))
  assert sum(sizes) == layers
  assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
  ("pattern", "stages", "sizes"),
  [
    ("type:block", 2, (5, 4)),
    ("type:BLOCK", 5, (3, 1, 1, 1, 3)),
    ("type:^(block|norm)$", 3, (4, 2, 3)),
    ("type:embed|head", 2, (8, 1)),
  ],
)
def test_stages_begin_with_a_match_and_have_equally_many(pattern, stages, sizes):
  names = ["embed", "block", "norm", "block", "block", "block", "block", "norm", "head"]
  found = by_pattern([LayerCost(name) for name in names], stages, pattern)
  assert found.sizes == sizes
  assert found.method == pattern


def test_a_rule_is_chosen_by_name():
  layers, _ = _drawn(3)
  layers = layers * 2
  assert cut(layers, 2, "balanced") == balanced(layers, 2)
  assert cut(layers, 2, "variance") == by_variance(layers, 2)
  assert cut(layers, 2, "parameters") == by_parameters(layers, 2)
  assert cut(layers, 2, "uniform") == uniform(layers, 2)
  assert cut(layers, 2, "type:.") == by_pattern(layers, 2, "type:.")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda x: cut(x, 2, "even"), "unknown partition 'even'; known: uniform, balanced, variance"),
    (lambda x: cut(x, 4, "balanced"), "3 layers cannot fill 4 stages; use stages=3 or fewer"),
    (lambda x: uniform(x, 0), "3 layers cannot be cut into 0 stages; use stages=1 or more"),
    (lambda x: uniform([], 2, empty=True), "0 layers cannot fill 2 stages"),
    (lambda x: by_pattern(x, 2, "block"), "'block' is no pattern of layers; use \"type:REGEX\""),
    (lambda x: by_pattern(x, 2, "type:("), "is no regular expression"),
    (lambda x: by_pattern(x, 3, "type:[01]"), "2 layers match 'type:.01.', too few for 3 stages"),
    (lambda x: Partition(layers=x, sizes=(1, 1)), "are 2 layers, the model has 3"),
    (lambda x: Partition(layers=x, sizes=(4, -1)), "are no stages"),
    (lambda x: LayerCost("a", forward=-1), "forward=-1 of layer 'a' is no cost; use 0 or more"),
    (lambda x: LayerCost("a", output=float("nan")), "output=nan of layer 'a'"),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message) as raised:
    call([LayerCost(str(i)) for i in range(3)])
  assert "\n" not in str(raised.value)


def test_stages_are_the_sums_of_their_layers():
  layers = [LayerCost(str(i), i, 2 * i, 3 * i, 10 * i, 5 * i, i) for i in range(1, 5)]
  partition = Partition(layers=layers, sizes=[1, 0, 3])
  first, none, last = partition.stages
  assert (first.time, first.parameters, first.activations, first.output) == (6, 10, 5, 1)
  assert (none.time, none.parameters, none.activations, none.output) == (0, 0, 0, 1)
  assert (last.time, last.parameters, last.activations, last.output) == (54, 90, 45, 4)
  assert partition.boundaries == (0, 1, 1, 4)
  assert partition.imbalance == 54 * 3 / 60
  timeline = simulate(
    make_schedule("gpipe", devices=3, microbatches=2), partition.costs(hop=1), partition.memory
  )
  assert timeline.busy == (12, 0, 108)
  assert timeline.peak_memory == (10, 0, 90)
  assert str(partition).splitlines()[3].split()[:3] == ["1", "none", "0"]
