"""Longest paths against the simulator."""

import random

import pytest

from jaxpipe.schedules import Costs, make_schedule, schedule_names, simulate
from jaxpipe.schedules.partition.critical import CriticalPaths

# These search, the longer the more there is.
SEARCHED = ("zb-v", "v-min", "v-half", "v-zb")


def _drawn(name, seed):
  draw = random.Random(seed)
  P, M = (2, 3) if name in SEARCHED else (4, draw.randint(1, 9))
  schedule = make_schedule(name, devices=P, microbatches=M)
  loads = [tuple(draw.randint(0, 9) for _ in "FIW") for _ in range(schedule.stages)]
  hop = draw.randint(0, 3)
  costs = Costs(*(list(column) for column in zip(*loads, strict=True)), hop)
  return CriticalPaths(schedule, hop), loads, simulate(schedule, costs).makespan


def _length(path, loads):
  weights, hops = path
  return hops + sum(
    count * time
    for stage, times in zip(weights, loads, strict=True)
    for count, time in zip(stage, times, strict=True)
  )


@pytest.mark.parametrize("name", schedule_names())
def test_the_longest_path_is_the_makespan(name):
  for seed in range(3):
    paths, loads, makespan = _drawn(name, seed)
    assert paths.makespan(loads) == makespan
    assert _length(paths.path(loads), loads) == makespan


@pytest.mark.parametrize("name", schedule_names())
def test_no_path_is_longer_under_other_costs(name):
  paths, loads, makespan = _drawn(name, 1)
  draw = random.Random(2)
  others = [tuple(draw.randint(0, 9) for _ in "FIW") for _ in loads]
  for path in [paths.path(others), *paths.device_paths()]:
    assert _length(path, loads) <= makespan
