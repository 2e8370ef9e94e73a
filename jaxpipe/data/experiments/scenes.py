"""Makes scenes of several digits, with the class of every pixel, anew for every step.

A scene is a pure function of the digits it is made from, a seed and a number: nothing is stored,
and a run that resumes sees what it would have seen.
"""

from __future__ import annotations

import numpy as np

BACKGROUND = 0
CLASSES = 11  # the background, then the digits 0 to 9
_INK = 0.25  # of the brightest pixel: what is fainter belongs to the background


def make_scenes(
  images: np.ndarray,
  labels: np.ndarray,
  *,
  seed: int,
  number: int,
  rows: int,
  size: int = 32,
  most: int = 6,
  noise: float = 0.1,
) -> dict[str, np.ndarray]:
  """Pastes digits onto empty canvases and adds noise.

  Args:
    images: float [N, h, w], 0 paper to 1 ink.
    labels: int [N], 0 to 9.
    seed: of the whole series of scenes.
    number: which batch of the series, a step's number for example.
    rows: scenes to make.
    size: height and width of a canvas.
    most: a scene has one to `most` digits; later ones lie over earlier ones.
    noise: standard deviation of what is added to every pixel.

  Returns:
    `image` float32 [rows, size, size, 1], `label` int32 [rows, size, size] (`BACKGROUND`, or the
    digit plus one where there is ink) and `weights` float32 [rows], all 1.

  Raises:
    ValueError: digits that are larger than the canvas.
  """
  height, width = images.shape[1:]
  if max(height, width) > size:
    raise ValueError(
      f"digits of {height}x{width} on a canvas of {size}; use size={max(height, width)}"
    )
  random = np.random.default_rng((seed, number))
  canvas = np.zeros((rows, size, size), np.float32)
  classes = np.full((rows, size, size), BACKGROUND, np.int32)
  for row in range(rows):
    for chosen in random.integers(len(images), size=random.integers(1, most + 1)):
      top, left = random.integers((size - height + 1, size - width + 1))
      at = (row, slice(top, top + height), slice(left, left + width))
      ink = images[chosen] >= _INK
      canvas[at] = np.where(ink, images[chosen], canvas[at])
      classes[at] = np.where(ink, labels[chosen] + 1, classes[at])
  canvas += noise * random.standard_normal(canvas.shape, np.float32)
  return {
    "image": canvas[..., None],
    "label": classes,
    "weights": np.ones(rows, np.float32),
  }
