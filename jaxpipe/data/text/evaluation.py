"""Batches that cover every token of a held-out split once, in order, to measure a loss on.

A validation loss is comparable only if it covers the same targets whatever the batch size, so the
last window and the last batch are padded with weight 0, never dropped. And only if its unit does
not depend on the vocabulary: sum of losses in nats / `target_bytes` is nats per byte.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.text.bins import TokenBin
from jaxpipe.data.text.windows import Batch, Rows, check_sizes, pick_rows, read_windows


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
  """The batches that cover a split; each token but the first is a target of weight 1 once.

  Attributes:
    source: the tokens, at least 2.
    batch_size: B, rows of the whole batch, over all processes.
    sequence_length: T; may exceed the split, the rest is padding.
    rows: which of the B rows to read, as in `TokenBatches`. All processes have equally many
      batches, so that none waits for another in a collective.

  Raises:
    DataError: sizes below 1, rows outside the batch, or fewer than 2 tokens.
  """

  source: TokenBin
  batch_size: int
  sequence_length: int
  rows: Rows = dataclasses.field(default=None, kw_only=True)

  def __post_init__(self) -> None:
    # Before the first step: a run should not reach its first evaluation only to end there.
    check_sizes(self.batch_size, self.sequence_length)
    pick_rows(self.batch_size, self.rows)
    if self.target_count < 1:
      count = len(self.source.tokens)
      raise DataError(f"{self.source.path}: {count} tokens, at least 2 needed; use a longer --text")

  @property
  def target_count(self) -> int:
    """Number of targets in the whole split: the sum of all weights."""
    return len(self.source.tokens) - 1

  def target_bytes(self, byte_lengths: npt.NDArray[np.int32]) -> int:
    """Returns the bytes of text that all targets of the split stand for.

    Args:
      byte_lengths: int32 [vocabulary], `Tokenizer.byte_lengths`.

    Raises:
      DataError: the lengths are of another vocabulary.
    """
    # Another tokenizer's lengths would index without error and give a wrong loss.
    size = self.source.header.vocabulary_size
    if len(byte_lengths) != size:
      raise DataError(
        f"{self.source.path}: has a vocabulary of {size}, but {len(byte_lengths)} byte lengths are "
        "given; use those of the tokenizer that made it"
      )
    # From the stream itself: no process then needs the other processes' batches for the sum.
    counts = np.bincount(self.source.tokens[1:], minlength=size)
    return int(counts @ byte_lengths.astype(np.int64))

  def __len__(self) -> int:
    """Number of batches, the padded last one included."""
    return -(-self.target_count // (self.batch_size * self.sequence_length))

  def __getitem__(self, index: int) -> Batch:
    """Returns batch `index` as `read_windows` does, the R rows that `rows` selects."""
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    # Numbers past the last window are kept: they read as rows of padding, so shapes never change
    # and the evaluation step is compiled once.
    windows = index * self.batch_size + pick_rows(self.batch_size, self.rows)
    starts = (windows * self.sequence_length).tolist()
    return read_windows(self.source.tokens, starts, self.sequence_length)

  def __iter__(self) -> Iterator[Batch]:
    return (self[index] for index in range(len(self)))


def target_bytes(batch: Batch, byte_lengths: npt.NDArray[np.int32]) -> int:
  """Returns the bytes of text that the targets of one batch stand for, padding left out.

  Args:
    batch: of `TokenBatches` or `EvaluationBatches`.
    byte_lengths: int32 [vocabulary], `Tokenizer.byte_lengths`.
  """
  # Padding holds token 0, which is a real token too: only the weight tells them apart.
  return int(byte_lengths[batch["targets"][batch["weights"] > 0]].sum(dtype=np.int64))
