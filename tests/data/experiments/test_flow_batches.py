"""Noise and time are a pure function of (seed, step)."""

import numpy as np

from jaxpipe.data.experiments.flow_batches import FlowBatches

IMAGES, LABELS = np.arange(5.0)[:, None, None] * np.ones((5, 4, 4)), np.arange(5)


def batches(**changes):
  shape = dict(images=IMAGES, labels=LABELS, batch_size=64, latent=(4, 2), no_class=9)
  return FlowBatches(**{**shape, **changes})


def test_a_step_is_the_same_whenever_it_is_read():
  one, other = batches()[3], batches()[3]
  assert set(one) == {"images", "labels", "time", "noise"}
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])
    assert (one[name] != batches()[4][name]).any() and (one[name] != batches(seed=1)[3][name]).any()


def test_images_keep_their_labels_unless_these_are_withheld():
  batch = batches(unlabelled=0.5)[0]
  withheld = batch["labels"] == 9
  assert 0.25 < withheld.mean() < 0.75
  np.testing.assert_array_equal(batch["images"][~withheld, 0, 0], batch["labels"][~withheld])


def test_times_cover_the_unit_interval_evenly():
  time = np.sort(batches()[0]["time"])
  np.testing.assert_array_equal(np.floor(time * 64), np.arange(64))
