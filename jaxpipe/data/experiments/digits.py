"""Reads the handwritten digits of 8x8 pixels that ship in `data/digits`, and makes batches of them.

References:
  E. Alpaydin and C. Kaynak, Cascading classifiers, Kybernetika 34(4), 1998.
"""

from __future__ import annotations

import dataclasses
import gzip
import os
import pathlib
import zlib

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.examples import Arrays, draws, shuffled

SIZE = 8
CLASSES = 10
_DEEPEST = 16  # a pixel counts the set ones of 4 x 4 finer pixels
_TEST_EVERY = 5
_SPLIT_SEED = 0  # part of the data: another split would be another test set


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Digits:
  """The digits, split into training and test images.

  Attributes:
    train: `image` float32 [N, 8, 8, 1] from 0 to 1, `label` int32 [N].
    test: held-out images and labels, in the same arrays.
    checksum: CRC-32 of the file, 8 hex digits.
  """

  train: Arrays
  test: Arrays
  checksum: str

  def batch(self, batch_size: int, seed: int, step: int, shift: int = 1) -> Arrays:
    """Makes training batch `step`: shuffled, each image moved by up to `shift` pixels each way.

    Args:
      batch_size: B.
      seed, step: with these equal, the batch is equal.
      shift: 0 leaves the images as they are.

    Returns:
      `image` float32 [B, 8, 8, 1], `label` int32 [B], `weights` float32 [B], all 1.
    """
    rows = shuffled(len(self.train["label"]), batch_size, seed, step)
    by = draws(seed, step).integers(-shift, shift + 1, (batch_size, 2))
    return {
      "image": moved(self.train["image"][rows], by),
      "label": self.train["label"][rows],
      "weights": np.ones(batch_size, np.float32),
    }

  @property
  def most_frequent(self) -> float:
    """Test accuracy of always naming the digit that is most frequent in training."""
    best = np.bincount(self.train["label"]).argmax()
    return float(np.mean(self.test["label"] == best))


def load_digits(path: str | os.PathLike[str]) -> Digits:
  """Reads the set and splits it: of each digit a fifth for testing, drawn by a fixed seed.

  Args:
    path: `digits.csv.gz`: a line an image, 64 pixels from 0 to 16 and the digit.

  Raises:
    DataError: no such file, or not such a file.
  """
  try:
    packed = pathlib.Path(path).read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    table = np.array([line.split(",") for line in lines], np.int32)
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise DataError(f"{path}: cannot be read as digits ({error}); restore the file") from None
  if table.ndim != 2 or table.shape[1] != SIZE * SIZE + 1:
    raise DataError(f"{path}: {list(table.shape)} numbers; a digit has {SIZE * SIZE} and its label")
  image = (table[:, :-1].reshape(-1, SIZE, SIZE, 1) / _DEEPEST).astype(np.float32)
  label = table[:, -1]
  test = _test_rows(label)
  train = np.setdiff1d(np.arange(len(label)), test)
  return Digits(
    train={"image": image[train], "label": label[train]},
    test={"image": image[test], "label": label[test]},
    checksum=f"{zlib.crc32(packed):08x}",
  )


def _test_rows(label: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
  """Returns the rows held out for testing: every fifth, once shuffled and then sorted by digit."""
  rows = np.random.default_rng(_SPLIT_SEED).permutation(len(label))
  return np.sort(rows[np.argsort(label[rows], kind="stable")][::_TEST_EVERY])


def moved(image: npt.NDArray, by: npt.NDArray[np.int64]) -> npt.NDArray:
  """Moves each image down and to the right; what comes in is 0.

  Args:
    image: [B, H, W, C].
    by: int [B, 2], rows and columns, possibly negative.
  """
  H, W = image.shape[1:3]
  reach = int(np.abs(by).max(initial=0))
  padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  row = np.arange(H)[None, :, None] + reach - by[:, 0, None, None]
  column = np.arange(W)[None, None, :] + reach - by[:, 1, None, None]
  return padded[np.arange(len(image))[:, None, None], row, column]
