"""U-Net: what travels between its layers, and what it says about every pixel."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.vision.segmentation import (
  Picture,
  Pixels,
  SegmentationConfig,
  mean_iou,
  segmentation,
)

CONFIG = SegmentationConfig(classes=3, widths=(4, 6, 8))


def test_skips_are_laid_down_and_taken_up_again():
  x = nnx.eval_shape(lambda: Picture(CONFIG)({"image": np.ones((2, 8, 8, 1), np.float32)}))
  seen = []
  for factory in segmentation(CONFIG).layers:
    module = nnx.eval_shape(lambda factory=factory: factory(nnx.Rngs(0)))
    module.eval()
    x = nnx.eval_shape(lambda module, x: module(x, None), module, x)
    seen.append((x["h"].shape[1:], [skip.shape[1:] for skip in x["skips"]]))
  assert seen == [
    ((4, 4, 4), [(8, 8, 4)]),
    ((2, 2, 6), [(8, 8, 4), (4, 4, 6)]),
    ((2, 2, 8), [(8, 8, 4), (4, 4, 6)]),
    ((4, 4, 6), [(8, 8, 4)]),
    ((8, 8, 4), []),
  ]


def test_doubling_keeps_pixels_where_they_were():
  """The matrix that copies a pixel into four makes each pixel a square of two by two."""
  up = segmentation(CONFIG).layers[-1](nnx.Rngs(0))
  up.double.kernel[...] = np.tile(np.eye(6, 4, dtype=np.float32), (1, 4))
  up.convolutions = lambda both: both
  h = np.random.default_rng(0).normal(size=(1, 4, 4, 6)).astype(np.float32)
  skip = np.zeros((1, 8, 8, 4), np.float32)
  out = up({"h": h, "skips": (skip,)}, None)["h"]
  np.testing.assert_allclose(out[..., 4:], h[..., :4].repeat(2, 1).repeat(2, 2), rtol=1e-6)


def test_pixels_are_counted_by_class_and_padding_is_not():
  rng = np.random.default_rng(0)
  head = Pixels(CONFIG, nnx.Rngs(0))
  h = rng.normal(size=(3, 4, 4, 4)).astype(np.float32)
  label = rng.integers(0, 3, (3, 4, 4)).astype(np.int32)
  batch = {"label": label, "weights": np.array([1, 1, 0], np.float32)}
  loss, weight, metrics = head({"h": h, "skips": ()}, batch)
  logits = np.asarray(head.linear(h))[:2]
  truth, answer = label[:2], logits.argmax(-1)
  shared = [((truth == k) & (answer == k)).sum() for k in range(3)]
  union = [((truth == k) | (answer == k)).sum() for k in range(3)]
  log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), truth[..., None], -1)
  np.testing.assert_allclose(loss, -log_p.sum(), rtol=1e-5)
  assert float(weight) == 32 and float(metrics["correct"]) == (truth == answer).sum()
  np.testing.assert_array_equal(metrics["intersection"], shared)
  np.testing.assert_array_equal(metrics["union"], union)


def test_a_class_that_nobody_names_has_no_say():
  assert mean_iou(np.array([1.0, 3, 0]), np.array([4.0, 4, 0])) == 0.5


def test_impossible_shapes():
  with pytest.raises(ValueError, match="1 widths leave nothing to skip"):
    SegmentationConfig(classes=3, widths=(4,))
  with pytest.raises(ValueError, match="pictures of 6x8 halved 2 times; use multiples of 4"):
    Picture(CONFIG)({"image": np.ones((2, 6, 8, 1), np.float32)})
