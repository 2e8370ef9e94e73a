"""Scenes of digits: made by number alone, and every pixel's class is what one sees there."""

import numpy as np
import pytest

from jaxpipe.data.experiments.scenes import BACKGROUND, make_scenes

# A digit d is a square of ink of its own brightness, with a faint rim.
IMAGES = np.full((10, 4, 4), 0.1, np.float32)
IMAGES[:, 1:3, 1:3] = 0.5 + np.arange(10)[:, None, None] / 20
LABELS = np.arange(10)


def make(number=0, **changes):
  options = dict(seed=3, rows=8, size=12, most=4, noise=0.0) | changes
  return make_scenes(IMAGES, LABELS, number=number, **options)


def test_a_number_makes_its_scenes_and_no_others():
  a, b, other = make(1), make(1), make(2)
  np.testing.assert_equal(a, b)
  assert (a["image"] != other["image"]).any() and (a["image"] != make(1, seed=4)["image"]).any()


def test_every_class_is_that_of_the_ink():
  scene = make()
  image, label = scene["image"][..., 0], scene["label"]
  ink = label != BACKGROUND
  np.testing.assert_array_equal(ink, image >= 0.25)
  np.testing.assert_allclose(image[ink], 0.5 + (label[ink] - 1) / 20)
  counted = ink.sum((1, 2))
  assert counted.min() >= 1 and counted.max() <= 4 * 4  # each has four pixels of ink
  assert scene["weights"].tolist() == [1] * 8


def test_noise_moves_no_class():
  quiet, loud = make(), make(noise=0.3)
  np.testing.assert_array_equal(quiet["label"], loud["label"])
  assert np.std(loud["image"] - quiet["image"]) == pytest.approx(0.3, rel=0.1)


def test_a_canvas_that_is_too_small():
  with pytest.raises(ValueError, match="digits of 4x4 on a canvas of 3; use size=4"):
    make(size=3)
