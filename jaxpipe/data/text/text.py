"""Prepares text files for training: tokenises them and splits the tokens, once for every text.

Tokenising is slow beside everything else here, so bins are kept in a cache. Their names come from
the content: of the text, the tokenizer and the split. A changed text is another name, so nothing
ever has to be invalidated, and no run can pick up another's bins.
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence

from jaxpipe.data.errors import DataError
from jaxpipe.data.text.bins import TokenBin, open_bin, write_bin
from jaxpipe.data.text.tokenizer import Tokenizer, make_tokenizer

# Part of every name in the cache: raise it when the same text shall give other tokens.
_RECIPE = "text 1"

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData:
  """A text ready for training.

  Attributes:
    train: tokens to train on.
    validation: tokens of the end of the text, which are held out from training.
    tokenizer: with which both were made.
  """

  train: TokenBin
  validation: TokenBin
  tokenizer: Tokenizer


def prepare_text(
  source: PathLike | Sequence[PathLike],
  tokenizer: Tokenizer | str,
  cache_dir: PathLike,
  *,
  validation_fraction: float = 0.05,
) -> TextData:
  """Tokenises text files and splits them, or finds in the cache that it has done so before.

  Args:
    source: a text file, several (a list, or one string with commas), a folder (all its `.txt`
      files, by name) or one `.bin` made by `write_bin`. Text must be UTF-8; files are joined in
      order, with a newline after one that does not end in one.
    tokenizer: a tokenizer, or what `make_tokenizer` takes; `bpe:SIZE` is trained on the training
      part alone.
    cache_dir: a folder for bins and trained tokenizers, made if missing. Any number of processes
      and runs may share it.
    validation_fraction: share of the bytes (of the tokens, for a `.bin`) held out, at the end.

  Returns:
    The mapped bins and the tokenizer.

  Raises:
    DataError: a missing, empty, non-UTF-8 or too short text, or a `.bin` of another tokenizer.
  """
  if not 0 < validation_fraction < 1:
    raise DataError(f"a validation fraction of {validation_fraction} is not between 0 and 1")
  paths = _list_files(source)
  if len(paths) == 1 and paths[0].suffix == ".bin":
    return _split_bin(paths[0], tokenizer, cache_dir, validation_fraction)
  # Whole in memory: what does not fit is tokenised elsewhere and comes as a .bin.
  text = b"".join(_read_text(path) for path in paths)
  # The text is cut, not its tokens: no token then spans both parts, and bytes count exactly.
  cut = _find_cut(text, validation_fraction)
  if isinstance(tokenizer, str):
    tokenizer = make_tokenizer(tokenizer, text=text[:cut].decode, cache_dir=cache_dir)
  name = _cache_name(text, cut, tokenizer)
  halves = {"train": text[:cut], "validation": text[cut:]}
  bins = {
    half: _cached_bin(pathlib.Path(cache_dir) / f"{name}-{half}.bin", part, tokenizer)
    for half, part in halves.items()
  }
  return TextData(train=bins["train"], validation=bins["validation"], tokenizer=tokenizer)


def _list_files(source: PathLike | Sequence[PathLike]) -> list[pathlib.Path]:
  """Resolves a source to files that exist; the order decides the tokens, so it is fixed."""
  if isinstance(source, str):
    source = [part.strip() for part in source.split(",") if part.strip()]
  elif isinstance(source, os.PathLike):
    source = [source]
  if not source:
    raise DataError("no text is given; use --text=FILE, --text=FILE,FILE or --text=FOLDER")
  paths: list[pathlib.Path] = []
  for path in map(pathlib.Path, source):
    if not path.exists():
      raise DataError(f"{path}: no such file or folder; check --text")
    # Sorted: a folder's own order differs between file systems.
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
      raise DataError(f"{path}: no .txt file in this folder; check --text")
    paths += files
  if len(paths) > 1 and any(path.suffix == ".bin" for path in paths):
    raise DataError(
      f"{source[0]}: a .bin cannot be joined with other files; give it alone as --text"
    )
  return paths


def _read_text(path: pathlib.Path) -> bytes:
  data = path.read_bytes()
  if not data.strip():
    raise DataError(f"{path}: no text in it ({len(data)} bytes); check --text")
  try:
    data.decode()
  except UnicodeDecodeError as error:
    raise DataError(
      f"{path}: byte {error.start} is {data[error.start]:#04x}, not UTF-8; "
      "convert the file first (iconv -t utf-8)"
    ) from None
  # Or the last word of one file and the first of the next would become one.
  return data if data.endswith(b"\n") else data + b"\n"


def _find_cut(text: bytes, validation_fraction: float) -> int:
  """Returns where validation starts: at a line, so no character and no word is cut in two."""
  earliest = int(len(text) * (1 - validation_fraction))
  # No further than half of the held-out text, or long lines would leave little of it.
  cut = text.find(b"\n", earliest, (earliest + len(text)) // 2) + 1
  if cut:
    return cut
  # Lines are long here: fall back to the next character.
  cut = earliest
  while cut < len(text) and text[cut] & 0xC0 == 0x80:
    cut += 1
  return cut


def _cache_name(text: bytes, cut: int, tokenizer: Tokenizer) -> str:
  # The cut stands for the fraction: two fractions that cut alike share their bins.
  digest = hashlib.sha256(f"{_RECIPE}|{cut}|{tokenizer.fingerprint}|".encode())
  digest.update(text)
  return digest.hexdigest()[:20]


def _cached_bin(path: pathlib.Path, text: bytes, tokenizer: Tokenizer) -> TokenBin:
  if path.exists():
    # Verified, although the name fits: a name says what was meant, not what the disk kept.
    try:
      return open_bin(path)
    except DataError as error:
      # The text is at hand, so a damaged cache is repaired; said aloud, as a disk may be failing.
      logging.getLogger(__name__).warning("making a cached bin again: %s", error)
  tokens = tokenizer.encode(text)
  _check_length(path, tokens.size, f"{len(text)} bytes of text")
  size, fingerprint = tokenizer.vocabulary_size, tokenizer.fingerprint
  write_bin(path, tokens, vocabulary_size=size, fingerprint=fingerprint)
  # Mapped from disk like a cached one, so that a first run and a second are the same.
  return open_bin(path, verify=False)


def _split_bin(
  path: pathlib.Path, tokenizer: Tokenizer | str, cache_dir: PathLike, validation_fraction: float
) -> TextData:
  """Splits a ready bin where it lies: two stretches of one map, nothing is written."""

  def no_text() -> str:
    raise DataError(f"{path}: a tokenizer cannot be trained on tokens; name the one that made them")

  if isinstance(tokenizer, str):
    tokenizer = make_tokenizer(tokenizer, text=no_text, cache_dir=cache_dir)
  # Equal vocabulary sizes prove nothing; ids of another tokenizer would train on noise.
  whole = open_bin(path)
  if whole.header.fingerprint != tokenizer.fingerprint:
    raise DataError(
      f"{path}: made by tokenizer {whole.header.fingerprint[:12]}, but this run uses "
      f"{tokenizer.fingerprint[:12]}; check --tokenizer"
    )
  if whole.header.vocabulary_size != tokenizer.vocabulary_size:
    raise DataError(
      f"{path}: has a vocabulary of {whole.header.vocabulary_size}, but its tokenizer"
      f" {tokenizer.vocabulary_size}; make the bin again, or check --tokenizer"
    )
  count = whole.header.count
  cut = int(count * (1 - validation_fraction))
  train, validation = whole.stretch(0, cut), whole.stretch(cut, count)
  _check_length(path, min(cut, count - cut), f"{count} tokens, split at {cut}")
  return TextData(train=train, validation=validation, tokenizer=tokenizer)


def _check_length(path: pathlib.Path, count: int, of: str) -> None:
  # One token has nothing to predict.
  if count < 2:
    raise DataError(f"{path}: {of} give {count} tokens, at least 2 are needed; use a longer --text")
