"""Tokenizers that know how many bytes of text each token stands for.

Loss per token cannot be compared across vocabularies: a larger one has fewer and harder tokens.
Loss in nats per byte can, if every token is worth an exact number of bytes. So only tokenizers
that keep every byte are allowed: raw bytes, and byte-level BPE without normalisation.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from jaxpipe.data.errors import DataError
from jaxpipe.data.text.bpe import Ids, load_bpe, train_bpe

_LARGEST = 2**24  # BPE vocabulary


class Tokenizer(Protocol):
  """A tokenizer as the rest of the data code needs it: `ByteTokenizer` or `BpeTokenizer`."""

  @property
  def vocabulary_size(self) -> int:
    """Number of ids: every id is below it."""

  @property
  def byte_lengths(self) -> Ids:
    """The bytes of UTF-8 text that each id stands for, int32 [vocabulary_size]."""

  @property
  def fingerprint(self) -> str:
    """64 hex digits, equal for two tokenizers that give the same ids for every text."""

  def encode(self, text: str | bytes) -> Ids:
    """Returns the ids of a text, int32 [tokens]; raises DataError for bytes that are not UTF-8."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of some ids, with U+FFFD where they break a character in two."""


class ByteTokenizer:
  """The tokenizer whose 256 ids are the bytes: nothing to train, nothing to store, any text."""

  vocabulary_size = 256

  def __init__(self) -> None:
    self.byte_lengths: Ids = np.ones(self.vocabulary_size, np.int32)
    # Shared by every user of the tokenizer.
    self.byte_lengths.flags.writeable = False
    # A constant: there is nothing that two byte tokenizers could differ in.
    self.fingerprint = hashlib.sha256(b"jaxpipe bytes 1").hexdigest()

  def encode(self, text: str | bytes) -> Ids:
    """Returns the UTF-8 bytes of a text, int32 [bytes]."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text, with U+FFFD where `ids` cut a character in two."""
    return bytes(int(i) for i in ids).decode(errors="replace")


def make_tokenizer(
  spec: str, *, text: Callable[[], str], cache_dir: str | os.PathLike[str]
) -> Tokenizer:
  """Makes the tokenizer that a flag names.

  Args:
    spec: `byte`, `bpe:SIZE` (trained on `text`, kept in `cache_dir`) or the path of a JSON file.
    text: gives the training text; called for `bpe:SIZE` only.
    cache_dir: where trained tokenizers are kept, by content of the text.

  Raises:
    DataError: a malformed spec, or any error of `train_bpe` and `load_bpe`.
  """
  if spec == "byte":
    return ByteTokenizer()
  # Anything else is a path, so that a mistyped name ends in "no such tokenizer file".
  kind, _, size = spec.partition(":")
  if kind != "bpe":
    return load_bpe(spec)
  # Above it the library itself fails, by a panic that no one can catch.
  if not size.isdecimal() or not 257 <= int(size) <= _LARGEST:
    raise DataError(
      f"--tokenizer={spec}: {size!r} is not a size from 257 to {_LARGEST}; use byte, bpe:4096 or a"
      " JSON file"
    )
  # By content, as bins are: another text never finds this text's merges.
  corpus = text()
  digest = hashlib.sha256(corpus.encode()).hexdigest()[:16]
  path = pathlib.Path(cache_dir) / f"bpe-{size}-{digest}.json"
  if path.exists():
    return load_bpe(path)
  return train_bpe(corpus, vocabulary_size=int(size), path=path)
