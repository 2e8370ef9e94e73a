"""Evaluation covers every target once, whatever the batch, and counts its bytes exactly."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.data import DataError, EvaluationBatches, TokenBin, prepare_text, target_bytes

MakeBin = Callable[[int], TokenBin]


@pytest.mark.parametrize("count", [2, 8, 9, 10, 65, 66, 100])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 8), (4, 8), (3, 5), (16, 64)])
def test_every_target_once_in_order(
  counting_bin: MakeBin, count: int, batch_size: int, length: int
) -> None:
  batches = EvaluationBatches(counting_bin(count), batch_size, length)
  read = list(batches)
  assert len(read) == len(batches)
  kept = [batch["weights"] == 1 for batch in read]
  targets = np.concatenate([b["targets"][k] for b, k in zip(read, kept, strict=True)])
  tokens = np.concatenate([b["tokens"][k] for b, k in zip(read, kept, strict=True)])
  np.testing.assert_array_equal(targets, np.arange(1, count))
  np.testing.assert_array_equal(tokens, np.arange(count - 1))
  assert sum(float(b["weights"].sum()) for b in read) == batches.target_count == count - 1
  assert all(b["tokens"].shape == (batch_size, length) for b in read)
  # Every batch is needed.
  assert all(b["weights"].any() for b in read)


def test_rows_make_up_the_whole(counting_bin: MakeBin) -> None:
  # 100 tokens are 13 windows: the last batch's slice for the second process is padding only.
  whole = EvaluationBatches(counting_bin(100), 4, 8)
  halves = [EvaluationBatches(counting_bin(100), 4, 8, rows=r) for r in (slice(2), slice(2, 4))]
  assert [len(half) for half in halves] == [len(whole)] * 2
  for index, batch in enumerate(whole):
    for name in batch:
      parts = np.concatenate([half[index][name] for half in halves])
      np.testing.assert_array_equal(parts, batch[name])
  assert not halves[1][len(whole) - 1]["weights"].any()


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
def test_target_bytes_are_those_of_the_text(tmp_path: Path, tokenizer: str) -> None:
  source = tmp_path / "a.txt"
  source.write_text("the cat sat on the mat – naïve café 東京\n" * 200)
  data = prepare_text(source, tokenizer, tmp_path / "cache")
  lengths = data.tokenizer.byte_lengths
  batches = EvaluationBatches(data.validation, 3, 16)
  # The first token is never a target.
  text = data.tokenizer.decode(data.validation.tokens)
  expected = len(text.encode()) - int(lengths[data.validation.tokens[0]])
  assert batches.target_bytes(lengths) == expected
  assert sum(target_bytes(batch, lengths) for batch in batches) == expected


def test_byte_lengths_of_another_vocabulary(counting_bin: MakeBin) -> None:
  with pytest.raises(DataError, match="vocabulary of 70000, but 256 byte lengths"):
    EvaluationBatches(counting_bin(100), 4, 8).target_bytes(np.ones(256, np.int32))


def test_one_token_has_no_target(counting_bin: MakeBin) -> None:
  with pytest.raises(DataError, match="1 tokens, at least 2 needed"):
    EvaluationBatches(counting_bin(1), 4, 8)


def test_beyond_the_last_batch(counting_bin: MakeBin) -> None:
  batches = EvaluationBatches(counting_bin(100), 4, 8)
  for index in (-1, len(batches)):
    with pytest.raises(IndexError, match=f"batch {index} of 4"):
      batches[index]
