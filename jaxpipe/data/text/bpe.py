"""Byte-level byte-pair encoding (BPE) by the `tokenizers` library, which must keep every byte.

The library can do much that loses text: normalise it, put a space in front, drop what it does not
know. Each of these would make the bytes of a token, and so nats per byte, wrong without a sign.
Hence `BpeTokenizer` refuses a tokenizer that may do any of them.

References:
  Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.2.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from jaxpipe.data.errors import DataError
from jaxpipe.data.files import atomic_file

# Characters given to the library at once, which bounds its memory. Where a block ends depends on
# the text alone, and so do the tokens.
_BLOCK = 1 << 16

Ids = npt.NDArray[np.int32]


class BpeTokenizer:
  """A tokenizer of byte-level BPE, which `train_bpe` or `load_bpe` makes; see `Tokenizer`."""

  def __init__(self, engine: tokenizers.Tokenizer, source: str = "tokenizer") -> None:
    """Takes over a tokenizer of the library.

    Args:
      engine: the library's object; must be byte-level BPE that keeps every byte.
      source: its file, for messages.

    Raises:
      DataError: some text would not come back byte for byte.
    """
    # The JSON form is the one public view of everything that decides the ids.
    spec = json.loads(engine.to_str())
    _check_lossless(spec, source)
    # Saved by some models; both would silently change how much text there is.
    engine.no_truncation()
    engine.no_padding()
    # Text that happens to spell "<|endoftext|>" is text.
    engine.encode_special_tokens = True
    self._engine = engine
    self.byte_lengths = _byte_lengths(spec)
    self.vocabulary_size = len(self.byte_lengths)
    self.fingerprint = _fingerprint(spec)

  def encode(self, text: str | bytes) -> Ids:
    """Returns the ids of a text, int32 [tokens].

    Raises:
      DataError: bytes that are not UTF-8.
    """
    if isinstance(text, bytes):
      try:
        text = text.decode()
      except UnicodeDecodeError as error:
        raise DataError(
          f"byte {error.start} of the text is not UTF-8; use --tokenizer=byte"
        ) from None
    # The fast form leaves out character offsets, most of an encoding's memory. No special tokens:
    # a marker of the beginning would be a token of no bytes.
    encodings = self._engine.encode_batch_fast(list(_blocks(text)), add_special_tokens=False)
    ids = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
    return np.concatenate(ids) if ids else np.zeros(0, np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text, with U+FFFD where `ids` cut a character in two."""
    return str(self._engine.decode([int(i) for i in ids], skip_special_tokens=False))

  def to_json(self) -> str:
    """Returns the tokenizer in the library's own format; `load_bpe` reads it back."""
    return str(self._engine.to_str(pretty=True))


def train_bpe(text: str, *, vocabulary_size: int, path: str | os.PathLike[str]) -> BpeTokenizer:
  """Trains byte-level BPE and saves it, in the library's own JSON format.

  Args:
    text: training text only: merges learned on validation text would flatter the validation loss.
    vocabulary_size: at least 257; 256 of the tokens are the bytes.
    path: the JSON file to write, whole or not at all.

  Raises:
    DataError: the vocabulary is too small to hold a merge, or larger than the text can fill.
  """
  if vocabulary_size <= 256:
    raise DataError(
      f"a BPE vocabulary of {vocabulary_size} holds nothing beyond 256 bytes; use bpe:257 or more"
    )
  engine = tokenizers.Tokenizer(tokenizers.models.BPE())
  # The prefix space would add a byte to every text.
  engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  engine.decoder = tokenizers.decoders.ByteLevel()
  # All 256 bytes, whether the training text has them or not: validation text may.
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocabulary_size,
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    special_tokens=[],
    show_progress=False,
  )
  engine.train_from_iterator(_blocks(text), trainer)
  # A model would carry embedding rows that no text can reach.
  if engine.get_vocab_size() < vocabulary_size:
    raise DataError(
      f"BPE on this text gives {engine.get_vocab_size()} tokens, not {vocabulary_size}; "
      f"use bpe:{engine.get_vocab_size()} or less, or a longer text"
    )
  with atomic_file(pathlib.Path(path)) as file:
    file.write(engine.to_str(pretty=True).encode())
  return BpeTokenizer(engine, str(path))


def load_bpe(path: str | os.PathLike[str]) -> BpeTokenizer:
  """Loads byte-level BPE from a local `tokenizer.json`.

  Raises:
    DataError: missing, not such a file, or a tokenizer that does not keep every byte.
  """
  if not pathlib.Path(path).is_file():
    raise DataError(
      f"{path}: no such tokenizer file; check --tokenizer, or use bpe:SIZE to train one"
    )
  try:
    engine = tokenizers.Tokenizer.from_file(str(path))
  # The library raises a bare Exception for any malformed file.
  except Exception as error:
    raise DataError(
      f"{path}: not a tokenizer JSON file ({error}); delete it and train it again"
    ) from None
  return BpeTokenizer(engine, str(path))


def _blocks(text: str) -> Iterator[str]:
  """Divides a text after line ends into blocks of about `_BLOCK` characters."""
  start = 0
  while start < len(text):
    stop = text.find("\n", start + _BLOCK) + 1 or len(text)
    yield text[start:stop]
    start = stop


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
  """Lists components of the library's JSON format, where one may stand alone or in a sequence."""
  if component is None:
    return []
  return list(component[key]) if component["type"] == "Sequence" else [component]


def _check_lossless(spec: dict[str, Any], source: str) -> None:
  """Refuses whatever would add, drop or change a byte of some text."""
  model = spec["model"]
  before = _parts(spec["pre_tokenizer"], "pretokenizers")
  after = _parts(spec["decoder"], "decoders")
  vocabulary = model.get("vocab", {})
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  # A table, so that a new way of losing text is one line here and one line in its test.
  complaints = {
    "it is not BPE": model.get("type") != "BPE",
    "it normalises text": spec["normalizer"] is not None,
    # Splitting first is fine (GPT-4 and its kin do), unless the separators are thrown away.
    "it does not start from bytes": not before or before[-1]["type"] != "ByteLevel",
    "it drops separators": any(
      part["type"] not in ("Split", "ByteLevel") or part.get("behavior") == "Removed"
      for part in before
    ),
    # Ids must decode by the same table of bytes, or round trips say nothing.
    "it does not decode to bytes": [part["type"] for part in after] != ["ByteLevel"],
    "it adds a space in front": any(part.get("add_prefix_space") for part in before),
    "its merges are random": bool(model.get("dropout")),
    "it lacks some of the 256 bytes": not all(letter in vocabulary for letter in alphabet),
    # Stripping takes neighbouring spaces; other characters would be decoded as byte letters.
    "an added token is not plain ASCII": any(
      token["lstrip"] or token["rstrip"] or not token["content"].isascii()
      for token in spec["added_tokens"]
    ),
  }
  for complaint, applies in complaints.items():
    if applies:
      raise DataError(
        f"{source}: {complaint}, so nats per byte would be wrong; use byte-level BPE or bpe:SIZE"
      )


def _byte_lengths(spec: dict[str, Any]) -> Ids:
  # In the byte-level alphabet each character is one byte; added tokens are plain text instead.
  lengths = {index: len(token) for token, index in spec["model"]["vocab"].items()}
  for token in spec["added_tokens"]:
    lengths[token["id"]] = len(token["content"].encode())
  # An id that nothing maps to can never be a target, so any length does.
  result = np.zeros(max(lengths) + 1, np.int32)
  result[list(lengths)] = list(lengths.values())
  result.flags.writeable = False
  return result


def _fingerprint(spec: dict[str, Any]) -> str:
  # Only what decides the ids: the rest of the file differs between versions of the library.
  model = spec["model"]
  parts = [model["vocab"], model["merges"], spec["added_tokens"], spec["pre_tokenizer"]]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
