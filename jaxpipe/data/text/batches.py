"""Training batches as a pure function of (seed, step).

Whatever the mesh, the process or the number of restarts, step k trains on the same rows. So a
checkpoint needs no state of the data beside its step, two meshes can be compared step by step, and
each process reads only its own rows without asking anyone.

    epoch 0           epoch 1           the rows of all batches are one stream:
    w3 w0 w4 w1 w2    w1 w4 w0 w2 w3    every epoch all windows, in an order of its own,
    [batch 0][batch 1   ][batch 2]...   cut into batches without regard to epochs (B = 3)

References:
  grain's MapDataset: a lazy sequence with random access and a shuffle that is computed, not stored.
"""

import dataclasses
import functools
import hashlib
import json

import grain
import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.text.bins import TokenBin
from jaxpipe.data.text.windows import Batch, Rows, check_sizes, pick_rows, read_windows


@dataclasses.dataclass(frozen=True)
class TokenBatches:
  """An endless sequence of batches: `batches[k]` is batch k, in any order, from any thread.

  A batch may begin in one epoch and end in the next, so no window is ever left out.

  Attributes:
    source: the tokens.
    batch_size: B, rows of the whole batch, over all processes.
    sequence_length: T.
    seed: any integer.
    rows: which of the B rows to read: a slice, or row numbers where a process has several
      stretches (a slice of every microbatch); None for all. Never changes what a row holds.
    random_offset: shift the windows by a new 0 to T - 1 tokens each epoch, so that not always the
      same tokens stand at the start of a window. Costs at most one window of each epoch.

  Raises:
    DataError: sizes below 1, rows outside the batch, or fewer tokens than one window.
  """

  source: TokenBin
  batch_size: int
  sequence_length: int
  seed: int
  rows: Rows = dataclasses.field(default=None, kw_only=True)
  random_offset: bool = dataclasses.field(default=False, kw_only=True)

  def __post_init__(self) -> None:
    # Now, not at the first batch: by then minutes of compiling would have passed.
    check_sizes(self.batch_size, self.sequence_length)
    pick_rows(self.batch_size, self.rows)
    count = len(self.source.tokens)
    if self.windows < 1:
      # With offsets a window must fit at every one of them.
      longest = count // 2 if self.random_offset else count - 1
      shorter = f"use --sequence_length={longest} or less, or" if longest > 0 else "use"
      raise DataError(
        f"{self.source.path}: {count} tokens are fewer than one window, which takes "
        f"{count - self._spare + self.sequence_length}; {shorter} a longer --text"
      )

  @property
  def windows(self) -> int:
    """Number of windows in one epoch."""
    return self._spare // self.sequence_length

  @property
  def _spare(self) -> int:
    # Tokens that can be first inputs or targets: all but one, and all but T if windows may shift.
    return len(self.source.tokens) - (self.sequence_length if self.random_offset else 1)

  @property
  def identity(self) -> dict[str, int | str | bool]:
    """JSON values that decide every batch, for a resumed run to compare; `rows` decide none."""
    # The path is not part of it: the same tokens elsewhere are the same data.
    header = self.source.header
    return {
      "tokens": f"{header.checksum:08x}+{self.source.start}",
      "token_count": len(self.source.tokens),
      "tokenizer": header.fingerprint,
      "batch_size": self.batch_size,
      "sequence_length": self.sequence_length,
      "seed": self.seed,
      "random_offset": self.random_offset,
    }

  @property
  def fingerprint(self) -> str:
    """32 hex digits: equal for equal `identity`, so for the same batches at all steps."""
    return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

  def __getitem__(self, step: int) -> Batch:
    """Returns batch `step` as `read_windows` does: the R rows that `rows` selects.

    Raises:
      IndexError: a negative step; there is no last batch to count from.
    """
    # grain would count from the end of its "endless" sequence, some 2**63 rows away.
    if step < 0:
      raise IndexError(f"batch {step}: steps start at 0")
    batch: Batch = self._dataset[step]
    return batch

  def iterate(
    self, start: int = 0, *, threads: int = 1, prefetch: int = 2
  ) -> grain.DatasetIterator[Batch]:
    """Iterates over batches `start`, `start + 1`, ... without end, reading ahead.

    Args:
      start: the first step, that of the checkpoint when a run resumes.
      threads: background threads that read; 0 reads in the caller's.
      prefetch: batches read ahead, each of 12 * R * T bytes.

    Returns:
      grain's iterator; its `close()`, or its end of life, stops the threads.

    Raises:
      IndexError: a negative start.
    """
    if start < 0:
      raise IndexError(f"batch {start}: steps start at 0")
    # Random access makes this free: resuming at a late step reads none of those before it.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(self._dataset.slice(slice(start, None)).to_iter_dataset(options))

  @functools.cached_property
  def _dataset(self) -> grain.MapDataset[Batch]:
    # grain shuffles epoch e of seed s by s + e, so that seed 1 alone would begin with the second
    # epoch of seed 0. Mixed seeds lie far apart.
    order = grain.MapDataset.range(self.windows).shuffle(seed=_mix("order", self.seed)).repeat()
    # Repeated before batched, so that the rest of an epoch is filled up from the next.
    return order.batch(self.batch_size).map_with_index(self._load)

  def _load(self, step: int, windows: npt.NDArray[np.int64]) -> Batch:
    # `windows` is for all B rows, as numbers are cheap; tokens are read for our own rows alone.
    starts = []
    for row in pick_rows(self.batch_size, self.rows):
      # By row: the later rows of a batch may be in the next epoch.
      epoch = (step * self.batch_size + int(row)) // self.windows
      starts.append(int(windows[row]) * self.sequence_length + self._offset(epoch))
    return read_windows(self.source.tokens, starts, self.sequence_length)

  def _offset(self, epoch: int) -> int:
    return _mix("offset", self.seed, epoch) % self.sequence_length if self.random_offset else 0


def _mix(*words: str | int) -> int:
  """Hashes words to 32 bits: the same on every machine and in every version of NumPy."""
  return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:4], "little")
