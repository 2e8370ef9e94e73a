"""Writes and maps token bins: files of a header and raw tokens, which a run need not load whole.

A run that trains for days on the wrong or on half of the tokens looks healthy, so a bin carries
what is needed to refuse that: how many tokens there must be, their checksum, the vocabulary that
they index and the tokenizer that made them.

    [1] header, 128 bytes, little-endian
        magic 8s | version u32 | item bytes u32 | vocabulary u64 | count u64 | fingerprint 64s
        | crc32 of the tokens u32 | padding | crc32 of all the bytes before u32
    [2] tokens, count x uint16 or uint32

The version stands outside what later formats may change: first eight bytes magic, then version.
"""

import dataclasses
import os
import pathlib
import struct
import zlib

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.files import atomic_file

VERSION = 1
# The magic tells a bin from a text file given by mistake.
_MAGIC = b"JPTOKENS"
# 24 spare bytes for later fields, and 128 in all: tokens start aligned for any item size.
_LAYOUT = struct.Struct("<8sIIQQ64sI24xI")
_DTYPES: dict[int, np.dtype[np.unsignedinteger]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
# Streaming in blocks keeps verification at a few MiB of memory, whatever the size of the bin.
_BLOCK = 1 << 20

Tokens = npt.NDArray[np.unsignedinteger]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinHeader:
  """The header of a token bin.

  Attributes:
    dtype: of the tokens: uint16 or uint32, little-endian.
    vocabulary_size: every token is below it.
    count: number of tokens in the file.
    checksum: crc32 of the tokens' bytes.
    fingerprint: `Tokenizer.fingerprint` of the tokenizer that made them, 64 hex digits.
  """

  dtype: np.dtype[np.unsignedinteger]
  vocabulary_size: int
  count: int
  checksum: int
  fingerprint: str


# Compared by identity: comparing arrays field by field has no truth value.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenBin:
  """The tokens of a bin, mapped from its file, or a stretch of them.

  Attributes:
    path: the file, for messages.
    header: of the whole file.
    tokens: uint16 or uint32 [count], read-only and not in memory until read.
    start: position of `tokens[0]` in the file.
  """

  path: pathlib.Path
  header: BinHeader
  tokens: Tokens
  start: int = 0

  def stretch(self, start: int, stop: int) -> "TokenBin":
    """Returns tokens `start` to `stop` of this bin, mapped as before."""
    return dataclasses.replace(self, tokens=self.tokens[start:stop], start=self.start + start)


def write_bin(
  path: str | os.PathLike[str],
  tokens: npt.NDArray[np.integer],
  *,
  vocabulary_size: int,
  fingerprint: str,
) -> BinHeader:
  """Writes a token bin, whole or not at all.

  Args:
    path: the file to make or replace.
    tokens: integers [count], each in `[0, vocabulary_size)`.
    vocabulary_size: at most 2**31, so that tokens fit the int32 of a batch.
    fingerprint: 64 hex digits, `Tokenizer.fingerprint`.

  Returns:
    The header as written.

  Raises:
    DataError: no tokens, a token outside the vocabulary, or a vocabulary that does not fit.
  """
  path = pathlib.Path(path)
  # All checks come before the first byte is written.
  if tokens.ndim != 1 or not tokens.size:
    raise DataError(f"{path}: shape {tokens.shape} is not a stream of tokens; pass [count >= 1]")
  if not 0 < vocabulary_size <= 2**31:
    raise DataError(f"{path}: vocabulary size {vocabulary_size} is not between 1 and {2**31}")
  if len(fingerprint) != 64:
    raise DataError(f"{path}: fingerprint {fingerprint!r} is not 64 hex digits")
  for bad in (int(tokens.min()), int(tokens.max())):
    _check_range(path, bad, vocabulary_size)
  # Half the disk and half the reading, for most vocabularies.
  dtype = _DTYPES[2 if vocabulary_size <= 2**16 else 4]
  data = np.ascontiguousarray(tokens, dtype=dtype)
  header = BinHeader(
    dtype=dtype,
    vocabulary_size=vocabulary_size,
    count=data.size,
    checksum=zlib.crc32(data.data),
    fingerprint=fingerprint,
  )
  with atomic_file(path) as file:
    file.write(_pack(header))
    file.write(data.data)
  return header


def open_bin(path: str | os.PathLike[str], *, verify: bool = True) -> TokenBin:
  """Maps a token bin.

  Args:
    path: a file made by `write_bin`.
    verify: also read all tokens once, to check them against checksum and vocabulary (about 1 GB
      a second); the header and the file's size are checked always.

  Returns:
    The mapped bin.

  Raises:
    DataError: missing, empty, not a bin, of another version, damaged or truncated, or a token is
      outside the vocabulary.
  """
  path = pathlib.Path(path)
  header = _unpack(path, _read_start(path))
  # Exactly: fewer bytes are a copy cut short, more are two writers in one file.
  expected = _LAYOUT.size + header.count * header.dtype.itemsize
  size = path.stat().st_size
  if size != expected:
    raise DataError(
      f"{path}: {size} bytes, but its header says {header.count} tokens, {expected} bytes; "
      "it was cut short or appended to: make it again from the text"
    )
  # Read-only, so that no batch code can ever change the file through an array.
  tokens = np.memmap(path, dtype=header.dtype, mode="r", offset=_LAYOUT.size, shape=header.count)
  if verify:
    _verify(path, header, tokens)
  return TokenBin(path=path, header=header, tokens=tokens)


def _pack(header: BinHeader) -> bytes:
  fields = (header.vocabulary_size, header.count, header.fingerprint.encode(), header.checksum)
  raw = _LAYOUT.pack(_MAGIC, VERSION, header.dtype.itemsize, *fields, 0)
  # The header's own checksum: without it a flipped count or fingerprint would be believed.
  return raw[:-4] + struct.pack("<I", zlib.crc32(raw[:-4]))


def _read_start(path: pathlib.Path) -> bytes:
  """Returns the header's bytes, or fewer where the file has no more."""
  if not path.is_file():
    raise DataError(f"{path}: no such token bin; check the path, or make it from the text")
  with path.open("rb") as file:
    start = file.read(_LAYOUT.size)
  if not start:
    raise DataError(f"{path}: the file is empty; make it again from the text")
  return start


def _unpack(path: pathlib.Path, raw: bytes) -> BinHeader:
  """Checks in an order that gives each kind of damage its own message."""
  if raw[:8] != _MAGIC:
    raise DataError(f"{path}: not a token bin; give a text file, or a .bin made by write_bin")
  version = int.from_bytes(raw[8:12], "little")
  if len(raw) < _LAYOUT.size:
    raise DataError(
      f"{path}: {len(raw)} bytes, but a header alone has {_LAYOUT.size}; "
      "make it again from the text"
    )
  # Before the checksum: another version may keep its checksum elsewhere.
  if version != VERSION:
    raise DataError(
      f"{path}: format version {version}, but this program reads version {VERSION}; "
      "make it again from the text"
    )
  _, _, itemsize, vocabulary_size, count, fingerprint, checksum, own = _LAYOUT.unpack(raw)
  if zlib.crc32(raw[:-4]) != own:
    raise DataError(f"{path}: its header is damaged; make it again from the text")
  # Sound by its checksum and still wrong: written by a program that is not ours.
  if itemsize not in _DTYPES or not count:
    raise DataError(
      f"{path}: {count} tokens of {itemsize} bytes; a bin has at least 1, of 2 or 4 bytes"
    )
  return BinHeader(
    dtype=_DTYPES[itemsize],
    vocabulary_size=vocabulary_size,
    count=count,
    checksum=checksum,
    fingerprint=fingerprint.decode("ascii"),
  )


def _verify(path: pathlib.Path, header: BinHeader, tokens: Tokens) -> None:
  # One pass for both: reading is what costs.
  checksum, highest = 0, 0
  for start in range(0, header.count, _BLOCK):
    block = tokens[start : start + _BLOCK]
    checksum = zlib.crc32(block.data, checksum)
    highest = max(highest, int(block.max()))
  if checksum != header.checksum:
    raise DataError(
      f"{path}: its tokens have checksum {checksum:08x}, but its header says "
      f"{header.checksum:08x}; they are damaged: make it again from the text"
    )
  _check_range(path, highest, header.vocabulary_size)


def _check_range(path: pathlib.Path, token: int, vocabulary_size: int) -> None:
  # An index beyond the embedding's last row is clamped by XLA, not refused: training would go on.
  if not 0 <= token < vocabulary_size:
    raise DataError(
      f"{path}: token {token} is outside a vocabulary of {vocabulary_size}; "
      "make it again with the tokenizer of this run"
    )
