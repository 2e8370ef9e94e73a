"""Makes batches for flow matching: images with the noise and the time that go with them.

All that is random about a step is part of its batch, and a batch is a pure function of (seed,
step): every schedule, mesh and restart sees the same noise at the same time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Batch = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlowBatches:
  """An endless sequence of training batches: `batches[k]` is a pure function of (seed, k).

  Attributes:
    images: float32 [n, H, H], that rows are drawn from.
    labels: int [n], their classes.
    batch_size: B.
    latent: shape of the noise of one row, (N, C).
    seed: any integer that is not negative.
    unlabelled: share of rows whose class is withheld, so that samples can be guided (Ho and
      Salimans, arXiv 2207.12598).
    no_class: the label of these rows.
  """

  images: npt.NDArray[np.floating[Any]]
  labels: npt.NDArray[np.integer[Any]]
  batch_size: int
  latent: tuple[int, int]
  seed: int = 0
  unlabelled: float = 0.0
  no_class: int = 10

  def __getitem__(self, step: int) -> Batch:
    """Returns batch `step`.

    Its leaves are `images` [B, H, H], `labels` int32 [B], `time` [B] in [0, 1) and `noise`
    [B, N, C], all but the labels in float32.
    """
    rng, rows = np.random.default_rng([self.seed, step]), self.batch_size
    chosen = rng.integers(len(self.images), size=rows)
    withheld = rng.random(rows) < self.unlabelled
    # One time from each of B equal intervals, at random to rows: the mean over times that the loss
    # takes is then much less noisy than with B free draws (Kingma et al., arXiv 2107.00630).
    time = (rng.permutation(rows) + rng.random(rows)) / rows
    return {
      "images": self.images[chosen].astype(np.float32),
      "labels": np.where(withheld, self.no_class, self.labels[chosen]).astype(np.int32),
      "time": time.astype(np.float32),
      "noise": rng.standard_normal((rows, *self.latent)).astype(np.float32),
    }
