"""The branch and bound alone, without a start, against every partition."""

import itertools
import math
import random

import pytest

from jaxpipe.schedules.partition.minimax import Minimax
from jaxpipe.schedules.partition.rows import Row

RESOURCES = 2


def _value(row, sums, boundaries):
  pieces = itertools.pairwise(boundaries)
  return row.constant + sum(
    weight * (up_to[end] - up_to[start])
    for weights, (start, end) in zip(row.weights, pieces, strict=True)
    for weight, up_to in zip(weights, sums, strict=True)
  )


def _row(draw, stages):
  weights = tuple(tuple(draw.randint(0, 5) for _ in range(RESOURCES)) for _ in range(stages))
  return Row(weights=weights, constant=draw.randint(-9, 9))


@pytest.mark.sampled("seed", range(300), 30)
def test_the_least_largest_row_is_found(seed):
  draw = random.Random(seed)
  L, S, least = draw.randint(4, 8), draw.randint(1, 4), draw.choice((0, 1))
  sums = [[0, *itertools.accumulate(draw.randint(0, 9) for _ in range(L))] for _ in range(2)]
  every = [
    (0, *inner, L)
    for inner in itertools.combinations_with_replacement(range(L + 1), S - 1)
    if all(b - a >= least for a, b in itertools.pairwise((0, *inner, L)))
  ]
  hidden = [_row(draw, S) for _ in range(6)]
  # Limits that some partition just meets.
  limited = [_row(draw, S) for _ in range(draw.randint(0, 2))]
  met = draw.choice(every)
  conditions = [
    Row(weights=row.weights, constant=row.constant, limit=_value(row, sums, met)) for row in limited
  ]

  def judge(boundaries):
    row = max(hidden, key=lambda row: _value(row, sums, boundaries))
    return _value(row, sums, boundaries), row

  def fits(boundaries):
    return all(_value(row, sums, boundaries) <= row.limit for row in conditions)

  best = min(judge(boundaries)[0] for boundaries in every if fits(boundaries))
  known = hidden[: draw.randint(1, 3)]
  found = Minimax(
    sums=sums, stages=S, least=least, rows=[*known, *conditions], judge=judge, effort=10**6
  ).run()
  assert (found.value, found.lower_bound, found.proven) == (best, best, True)
  assert fits(found.boundaries)
  assert judge(found.boundaries)[0] == best


def test_nothing_within_the_limits_is_said_so():
  row = Row(weights=((1,), (1,)), limit=5)
  found = Minimax(
    sums=[[0, 3, 6]],
    stages=2,
    least=1,
    rows=[Row(weights=((1,), (2,))), row],
    judge=lambda _: (0, None),
    effort=10,
  ).run()
  assert found.boundaries is None
  assert found.lower_bound == math.inf
