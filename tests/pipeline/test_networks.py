"""Every network of the experiments against `jax.grad`, leaf by leaf, in float64.

The whole grid, nine networks x five schedules x P in 2, 4, partitions even and uneven in turn:
`./launch/test.sh tests/pipeline/test_networks.py --whole-grid`.
"""

import itertools

import pytest
from networks import of_experiments
from networks.drawn import drawn

import jaxpipe

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-v", "chimera")
GRID = [
  (network, name, P, (i + P // 2 + j) % 2 == 0, (i + j) % 4 == 3)
  for (i, name), P, (j, network) in itertools.product(
    enumerate(SCHEDULES), (2, 4), enumerate(of_experiments.NETWORKS)
  )
]
# Running statistics and frozen weights.
STATEFUL = {"amoebanet", "segmentation", "dit", "gnn", "speech"}


@pytest.mark.sampled("network, name, P, uneven, straight", GRID, 3)
def test_gradients_and_state_are_those_of_the_unpipelined_model(
  float64, network, name, P, uneven, straight
):
  make, batch = of_experiments.NETWORKS[network]
  schedule = jaxpipe.make_schedule(name, devices=P, microbatches=4)
  stack, data = make(), batch()
  # Alike layers that do not go into the stages evenly need a partition.
  if uneven or (stack.uniform and stack.depth % schedule.stages):
    stack = of_experiments.uneven(stack, schedule.stages)
  # Drawn, not fresh: gates that start at zero would hide what is behind them.
  report = jaxpipe.check(
    stack,
    schedule,
    jaxpipe.make_mesh(f"stage:{P}"),
    data,
    params=drawn(stack),
    unroll="auto" if straight else "none",
  )
  assert report.ok and report.tolerance == 1e-12, str(report)
  assert bool(report.state_errors) == (network in STATEFUL)
