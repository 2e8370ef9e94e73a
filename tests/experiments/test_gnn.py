"""What the graph experiment refuses, and what it measures against."""

import pytest

from experiments.gnn import GnnRun, build


def run(**changes):
  return build(GnnRun(**{"run_dir": "unused", "batch_size": 1024, **changes}))


def test_a_mesh_that_cuts_chunks_is_refused():
  with pytest.raises(ValueError, match="--mesh=stage:2,data:2 cuts a chunk; use stage alone"):
    run(mesh="stage:2,data:2")


def test_the_baseline_is_labels_spread_along_the_edges():
  task = run()
  assert task.baseline.metrics["accuracy"] == pytest.approx(0.781, abs=1e-3)
  assert not (task.batches(0)["weights"] * task.validation[0]["weights"]).any()


def test_without_edges_a_heading_knows_itself_alone():
  batch = run(edges=False).batches(0)
  assert batch["neighbours"].shape == (1024, 1)
  assert (batch["neighbours"][:1022, 0] == batch["node"][:1022]).all()
