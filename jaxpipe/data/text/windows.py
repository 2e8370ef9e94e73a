"""Reads windows of a token stream as the arrays of a batch.

Training and evaluation take windows at different places and then need the same arrays from them.
Window n of length T reads T + 1 tokens from n * T: the last is only a target, and the first input
of window n + 1. So every token but the first is a target once.

    stream    a b c d e f g        T = 3
    window 0  a b c d
    window 1        d e f g

Shapes: B rows of the batch, R rows of it that this process reads, T sequence length.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.text.bins import Tokens

Batch = dict[str, npt.NDArray[np.int32] | npt.NDArray[np.float32]]
Rows = slice | Sequence[int] | None


def read_windows(tokens: Tokens, starts: Iterable[int], sequence_length: int) -> Batch:
  """Reads one window a row; what lies beyond the stream's end is padding of weight 0.

  Args:
    tokens: the stream, unsigned integers.
    starts: R positions of the windows' first tokens, which may lie beyond the end.
    sequence_length: T.

  Returns:
    `tokens` int32 [R, T], `targets` int32 [R, T] (each the token after its input) and `weights`
    float32 [R, T], 1 where there is a target.
  """
  # Zeros first: what no window reaches is then padding, of a token that every vocabulary has.
  starts = list(starts)
  shape = (len(starts), sequence_length)
  tokens_RT, targets_RT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights_RT = np.zeros(shape, np.float32)
  for row, start in enumerate(starts):
    window = tokens[start : start + sequence_length + 1]
    # A window wholly beyond the end is empty, and has no target rather than minus one.
    length = max(len(window) - 1, 0)
    tokens_RT[row, :length] = window[:length]
    targets_RT[row, :length] = window[1:]
    weights_RT[row, :length] = 1
  return {"tokens": tokens_RT, "targets": targets_RT, "weights": weights_RT}


def pick_rows(batch_size: int, rows: Rows) -> npt.NDArray[np.int64]:
  """Returns the numbers of the batch's rows that `rows` selects, int64 [R].

  Raises:
    DataError: no row, or one that the batch does not have.
  """
  every = np.arange(batch_size)
  if rows is None:
    return every
  # By np.asarray and not by indexing: NumPy would take -1 for the last row.
  picked = every[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
  # A slice is clipped by NumPy without a word, so one beyond the batch ends here as empty.
  if not picked.size or picked.min() < 0 or picked.max() >= batch_size:
    raise DataError(
      f"rows={rows} of a batch of B={batch_size} selects none, or one beyond; use 0 to B - 1"
    )
  return picked


def check_sizes(batch_size: int, sequence_length: int) -> None:
  """Raises DataError unless both are at least 1."""
  if batch_size < 1 or sequence_length < 1:
    raise DataError(
      f"--batch_size={batch_size} --sequence_length={sequence_length}: both must be at least 1"
    )
