"""The scenes' task: what it trains on, what it is measured by, and its baseline."""

import dataclasses

import numpy as np
import pytest

from experiments.segment import SegmentRun, build, summarize
from jaxpipe.data.experiments.scenes import CLASSES
from jaxpipe.training.flags.errors import ConfigError

RUN = SegmentRun(run_dir="unused", batch_size=4, test_scenes=8)


def counts(truth, answer):
  """What the head would count."""
  shared = [((truth == k) & (answer == k)).sum() for k in range(CLASSES)]
  union = [((truth == k) | (answer == k)).sum() for k in range(CLASSES)]
  correct = (truth == answer).sum()
  return {"intersection": np.array(shared), "union": np.array(union), "correct": correct}


def test_the_baseline_is_what_naming_all_background_scores():
  task = build(RUN)
  truth = np.concatenate([batch["label"] for batch in task.validation])
  found = summarize(0.0, counts(truth, np.zeros_like(truth)), truth.size)
  assert found == pytest.approx(task.baseline.metrics)
  assert summarize(0.0, counts(truth, truth), truth.size) == {"mean_iou": 1, "pixels": 1}
  assert sum(map(task.weigh, task.validation)) == truth.size


def test_training_scenes_are_a_function_of_seed_and_step_and_never_those_of_the_test():
  task, other = build(RUN), build(dataclasses.replace(RUN, seed=1))
  np.testing.assert_equal(task.batches(3), build(RUN).batches(3))
  assert (task.batches(3)["image"] != other.batches(3)["image"]).any()
  assert (task.batches(0)["label"] != task.validation[0]["label"]).any()
  np.testing.assert_equal(task.validation, other.validation)  # whatever the seed


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(size=26), r"--size=26 is no multiple of 4; use 24 or 32"),
    (dict(convolution="fft"), r"--convolution=fft is unknown; use matmul, xla"),
  ],
)
def test_impossible_flags(changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(RUN, **changes)
