"""Batch k depends on seed and k alone, and an epoch is every window once."""

import dataclasses
import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest

from jaxpipe.data import Batch, DataError, TokenBatches, TokenBin
from jaxpipe.data.text.windows import Rows

MakeBin = Callable[[int], TokenBin]


def _assert_equal(a: Batch, b: Batch) -> None:
  assert a.keys() == b.keys() == {"tokens", "targets", "weights"}
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def _starts(batches: TokenBatches, count: int) -> list[int]:
  """Returns where the first `count` rows of the stream start; tokens are positions here."""
  steps = itertools.count()
  rows = itertools.chain.from_iterable(batches[k]["tokens"][:, 0].tolist() for k in steps)
  return list(itertools.islice(rows, count))


@pytest.mark.parametrize("offset", [False, True])
def test_batch_is_a_pure_function_of_seed_and_step(counting_bin: MakeBin, offset: bool) -> None:
  first = TokenBatches(counting_bin(205), 4, 8, 3, random_offset=offset)
  expected = [first[k] for k in range(20)]
  second = TokenBatches(counting_bin(205), 4, 8, 3, random_offset=offset)
  for k in np.random.default_rng(0).permutation(20):
    _assert_equal(second[int(k)], expected[k])


@pytest.mark.parametrize("offset", [False, True])
def test_row_slices_make_up_the_whole(counting_bin: MakeBin, offset: bool) -> None:
  whole = TokenBatches(counting_bin(205), 8, 8, 3, random_offset=offset)
  parts: list[Rows] = [slice(0, 3), slice(3, 4), [4, 6], (5, 7)]
  order = [0, 1, 2, 3, 4, 6, 5, 7]
  for k in (0, 1, 7, 1000):
    read = [dataclasses.replace(whole, rows=rows)[k] for rows in parts]
    joined = {name: np.concatenate([part[name] for part in read]) for name in read[0]}
    _assert_equal(joined, {name: array[order] for name, array in whole[k].items()})


def test_batch_size_only_cuts_the_stream_of_rows(counting_bin: MakeBin) -> None:
  # So a resumed run may change its batch size and still see every window once an epoch.
  streams = [_starts(TokenBatches(counting_bin(205), b, 8, 3), 120) for b in (1, 4, 7, 64)]
  assert all(stream == streams[0] for stream in streams)


@pytest.mark.parametrize(
  ("count", "length", "batch_size"), [(9, 8, 3), (205, 8, 4), (201, 8, 7), (200, 8, 32), (50, 1, 5)]
)
def test_every_epoch_is_every_window_once(
  counting_bin: MakeBin, count: int, length: int, batch_size: int
) -> None:
  batches = TokenBatches(counting_bin(count), batch_size, length, 0)
  windows = (count - 1) // length
  assert batches.windows == windows
  starts = _starts(batches, 3 * windows)
  epochs = [starts[e * windows : (e + 1) * windows] for e in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == [n * length for n in range(windows)]
  if windows > 5:
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_offsets_shift_whole_epochs(counting_bin: MakeBin) -> None:
  count, length = 205, 8
  # 24 windows in batches of 5: epochs begin inside a batch.
  batches = TokenBatches(counting_bin(count), 5, length, 0, random_offset=True)
  windows = batches.windows
  assert windows >= (count - 1) // length - 1
  starts = _starts(batches, 20 * windows)
  offsets = []
  for epoch in range(20):
    found = sorted(starts[epoch * windows : (epoch + 1) * windows])
    offsets.append(found[0])
    assert found == [found[0] + n * length for n in range(windows)]
    assert found[-1] + length < count
  assert len(set(offsets)) > 4 and max(offsets) < length


@pytest.mark.parametrize("offset", [False, True])
def test_targets_are_the_next_tokens(counting_bin: MakeBin, offset: bool) -> None:
  batches = TokenBatches(counting_bin(205), 4, 8, 1, random_offset=offset)
  for k in range(30):
    batch = batches[k]
    assert [batch[name].dtype for name in ("tokens", "targets", "weights")] == [
      np.int32,
      np.int32,
      np.float32,
    ]
    np.testing.assert_array_equal(
      batch["tokens"], batch["tokens"][:, :1] + np.arange(8, dtype=np.int32)
    )
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert (batch["weights"] == 1).all()


def test_tokens_above_16_bits_survive(counting_bin: MakeBin) -> None:
  batches = TokenBatches(counting_bin(69_001), 2, 1000, 0)
  highest = max(int(batches[k]["targets"].max()) for k in range(35))
  assert highest == 69_000


def test_seeds_share_no_epoch(counting_bin: MakeBin) -> None:
  # grain alone gives epoch e of seed s the order of s + e.
  windows = 25
  streams = [_starts(TokenBatches(counting_bin(205), 5, 8, s), 4 * windows) for s in (0, 1, 2)]
  epochs = [tuple(s[e * windows : (e + 1) * windows]) for s in streams for e in range(4)]
  assert len(set(epochs)) == len(epochs)


def test_seed_may_be_any_integer(counting_bin: MakeBin) -> None:
  for seed in (-1, 2**40, 2**64 + 1):
    assert TokenBatches(counting_bin(205), 4, 8, seed)[5]["tokens"].shape == (4, 8)


def test_order_is_what_it_was(counting_bin: MakeBin) -> None:
  # A checkpoint from an older version resumes on the same rows; if this fails, raise that first.
  plain = TokenBatches(counting_bin(205), 4, 8, 0)
  assert _starts(plain, 6) == [192, 104, 176, 72, 56, 48]
  shifted = dataclasses.replace(plain, random_offset=True)
  assert _starts(shifted, 6) == [113, 105, 177, 73, 57, 49]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reading_ahead_changes_nothing(counting_bin: MakeBin, threads: int) -> None:
  batches = TokenBatches(counting_bin(205), 4, 8, 3, rows=slice(1, 3), random_offset=True)
  for start in (0, 1, 9):
    read = batches.iterate(start, threads=threads, prefetch=3)
    for k, batch in enumerate(itertools.islice(read, 12), start):
      _assert_equal(batch, batches[k])


@pytest.mark.parametrize("explicitly", [False, True])
def test_reading_ahead_happens_in_the_background_and_ends(
  counting_bin: MakeBin, explicitly: bool
) -> None:
  # Readers of earlier tests may still be ending, so only new ones count.
  before = set(threading.enumerate())
  read = TokenBatches(counting_bin(205), 4, 8, 3).iterate()
  next(read)
  readers = set(threading.enumerate()) - before
  assert len(readers) == 1
  if explicitly:
    read.close()
  else:
    del read
  for thread in readers:
    thread.join(10)
    assert not thread.is_alive()


def test_steps_before_the_first(counting_bin: MakeBin) -> None:
  batches = TokenBatches(counting_bin(205), 4, 8, 3)
  with pytest.raises(IndexError, match="steps start at 0"):
    batches[-1]
  with pytest.raises(IndexError, match="steps start at 0"):
    batches.iterate(-1)


def test_fingerprint_tells_what_decides_a_batch(counting_bin: MakeBin) -> None:
  source = counting_bin(205)
  base = TokenBatches(source, 4, 8, 3)
  same = [TokenBatches(counting_bin(205), 4, 8, 3), dataclasses.replace(base, rows=[2])]
  assert {batches.fingerprint for batches in same} == {base.fingerprint}
  others = [
    TokenBatches(counting_bin(206), 4, 8, 3),
    TokenBatches(source.stretch(0, 204), 4, 8, 3),
    TokenBatches(source.stretch(1, 205), 4, 8, 3),
    TokenBatches(source, 2, 8, 3),
    TokenBatches(source, 4, 4, 3),
    TokenBatches(source, 4, 8, 4),
    TokenBatches(source, 4, 8, 3, random_offset=True),
  ]
  assert len({batches.fingerprint for batches in [base, *others]}) == 8


@pytest.mark.parametrize(
  ("count", "offset", "message"),
  [
    (8, False, "8 tokens are fewer than one window, which takes 9; use --sequence_length=7 or"),
    (15, True, "15 tokens are fewer than one window, which takes 16; use --sequence_length=7 or"),
    (1, False, "1 tokens are fewer than one window, which takes 9; use a longer --text"),
  ],
)
def test_too_short(counting_bin: MakeBin, count: int, offset: bool, message: str) -> None:
  with pytest.raises(DataError, match=message):
    TokenBatches(counting_bin(count), 4, 8, 0, random_offset=offset)
  # The remedy is one.
  if count > 1:
    assert TokenBatches(counting_bin(count), 4, 7, 0, random_offset=offset)[9]["tokens"].any()


@pytest.mark.parametrize("rows", [slice(4, 8), slice(2, 2), [], [4], [-1], (0, 9)])
def test_rows_outside_the_batch(counting_bin: MakeBin, rows: Rows) -> None:
  with pytest.raises(DataError, match="of a batch of B=4 selects none, or one beyond"):
    TokenBatches(counting_bin(205), 4, 8, 0, rows=rows)


@pytest.mark.parametrize(("batch_size", "length"), [(0, 8), (4, 0), (-1, 8)])
def test_sizes_below_one(counting_bin: MakeBin, batch_size: int, length: int) -> None:
  with pytest.raises(DataError, match="both must be at least 1"):
    TokenBatches(counting_bin(205), batch_size, length, 0)
