"""Makes batches of examples that fit in memory: arrays with a leading dim of N examples.

Training batches are a pure function of (seed, step), as those of text are (`text/batches.py`): all
epochs are one stream, each in an order of its own, and a batch may reach from one into the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError

Arrays = Mapping[str, npt.NDArray]

# One seed has two random streams: the orders of its epochs, and what a step draws besides.
_ORDER, _DRAWS = 0, 1


def shuffled(count: int, batch_size: int, seed: int, step: int) -> npt.NDArray[np.int64]:
  """Returns the numbers of the examples in batch `step`, int [B].

  Args:
    count: N.
    batch_size: B; may be more than N.
    seed: at least 0.
    step: at least 0.

  Raises:
    DataError: no examples.

  >>> two_epochs = [i for step in range(4) for i in shuffled(6, 3, 0, step).tolist()]
  >>> sorted(two_epochs[:6]) == sorted(two_epochs[6:]) == list(range(6))
  True
  """
  if count < 1:
    raise DataError("there are no examples to train on")
  stream = np.arange(step * batch_size, (step + 1) * batch_size)
  chosen = np.empty(batch_size, np.int64)
  for epoch in np.unique(stream // count):
    here = stream // count == epoch
    order = np.random.default_rng((seed, _ORDER, epoch)).permutation(count)
    chosen[here] = order[stream[here] % count]
  return chosen


def draws(seed: int, step: int) -> np.random.Generator:
  """Returns the generator that batch `step` draws augmentations from, at its start."""
  return np.random.default_rng((seed, _DRAWS, step))


def held_out(examples: Arrays, batch_size: int) -> Iterator[dict[str, npt.NDArray]]:
  """Yields all examples once, in order, in batches of one size.

  Args:
    examples: leaves [N, ...].
    batch_size: B.

  Yields:
    Leaves [B, ...], and `weights` float32 [B]: 0 for the rows that fill up the last batch, which
    repeat its first.
  """
  count = len(next(iter(examples.values())))
  for start in range(0, count, batch_size):
    rows = np.arange(start, start + batch_size)
    real = rows < count
    taken = np.where(real, rows, start)
    yield {**{name: leaf[taken] for name, leaf in examples.items()}, "weights": real.astype("f4")}
