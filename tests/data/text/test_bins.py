"""Every way in which a bin can be damaged has its own message, and no write can half succeed."""

import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.data import DataError, open_bin, write_bin
from jaxpipe.data.files import atomic_file

FINGERPRINT = "cd" * 32
TOKENS = np.arange(100) % 60
HEADER = 128
ROOT = Path(__file__).parents[3]


def _write(path: Path, tokens: np.ndarray = TOKENS, vocabulary_size: int = 60) -> bytes:
  write_bin(path, tokens, vocabulary_size=vocabulary_size, fingerprint=FINGERPRINT)
  return path.read_bytes()


def _flip(data: bytes, position: int) -> bytes:
  return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def _sealed(data: bytes) -> bytes:
  """Makes both checksums right again, as a foreign writer's would be."""
  body = data[HEADER:]
  head = data[:96] + struct.pack("<I", zlib.crc32(body)) + data[100 : HEADER - 4]
  return head + struct.pack("<I", zlib.crc32(head)) + body


@pytest.mark.parametrize(
  ("vocabulary_size", "dtype"), [(60, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_comes_back_as_written(tmp_path: Path, vocabulary_size: int, dtype: type) -> None:
  tokens = np.array([0, 5, vocabulary_size - 1, 7])
  _write(tmp_path / "a.bin", tokens, vocabulary_size)
  found = open_bin(tmp_path / "a.bin")
  assert found.tokens.dtype == dtype
  np.testing.assert_array_equal(found.tokens, tokens)
  assert (found.header.count, found.header.vocabulary_size) == (4, vocabulary_size)
  assert found.header.fingerprint == FINGERPRINT
  assert isinstance(found.tokens, np.memmap) and not found.tokens.flags.writeable


def test_several_blocks_are_verified(tmp_path: Path) -> None:
  tokens = np.arange((1 << 20) + 5) % 60
  data = _write(tmp_path / "a.bin", tokens)
  np.testing.assert_array_equal(open_bin(tmp_path / "a.bin").tokens, tokens)
  (tmp_path / "a.bin").write_bytes(_flip(data, len(data) - 2))
  with pytest.raises(DataError, match="damaged"):
    open_bin(tmp_path / "a.bin")


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
  "empty": (lambda d: b"", "the file is empty"),
  "another file": (lambda d: b"To be, or not to be" * 20, "not a token bin"),
  "part of a header": (lambda d: d[:50], "50 bytes, but a header alone has 128"),
  "magic flipped": (lambda d: _flip(d, 0), "not a token bin"),
  "version": (lambda d: _flip(d, 8), "format version 0, but this program reads version 1"),
  "count flipped": (lambda d: _flip(d, 24), "its header is damaged"),
  "fingerprint flipped": (lambda d: _flip(d, 40), "its header is damaged"),
  "own checksum flipped": (lambda d: _flip(d, HEADER - 1), "its header is damaged"),
  "no tokens": (lambda d: _sealed(d[:24] + bytes(8) + d[32:HEADER]), "0 tokens of 2 bytes"),
  "odd item size": (lambda d: _sealed(d[:12] + b"\x03" + d[13:]), "100 tokens of 3 bytes"),
  "cut short": (lambda d: d[:-2], "326 bytes, but its header says 100 tokens, 328 bytes"),
  "cut after the header": (lambda d: d[:HEADER], "128 bytes, but its header says 100 tokens"),
  "appended": (lambda d: d + b"xy", "330 bytes, but its header says 100 tokens, 328 bytes"),
  "token flipped": (lambda d: _flip(d, len(d) - 1), "its tokens have checksum"),
  "token out of range": (
    lambda d: _sealed(d[:-2] + struct.pack("<H", 60)),
    "token 60 is outside a vocabulary of 60",
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_has_its_message(tmp_path: Path, damage: str) -> None:
  change, message = DAMAGES[damage]
  path = tmp_path / "a.bin"
  path.write_bytes(change(_write(path)))
  with pytest.raises(DataError, match=message) as caught:
    open_bin(path)
  assert str(caught.value).startswith(f"{path}: ")
  assert "\n" not in str(caught.value)


def test_every_header_byte_is_guarded(tmp_path: Path) -> None:
  path = tmp_path / "a.bin"
  data = _write(path)
  for position in range(HEADER):
    path.write_bytes(_flip(data, position))
    with pytest.raises(DataError):
      open_bin(path)


def test_missing(tmp_path: Path) -> None:
  with pytest.raises(DataError, match=r"nowhere\.bin: no such token bin"):
    open_bin(tmp_path / "nowhere.bin")


def test_without_verifying_size_is_still_checked(tmp_path: Path) -> None:
  path = tmp_path / "a.bin"
  data = _write(path)
  path.write_bytes(_flip(data, len(data) - 1))
  assert open_bin(path, verify=False).header.count == 100
  path.write_bytes(data[:-1])
  with pytest.raises(DataError, match="cut short"):
    open_bin(path, verify=False)


@pytest.mark.parametrize(
  ("tokens", "vocabulary_size", "message"),
  [
    ([1, 60], 60, "token 60 is outside a vocabulary of 60"),
    ([-1, 3], 60, "token -1 is outside"),
    ([], 60, "not a stream of tokens"),
    ([[1]], 60, "not a stream of tokens"),
    ([1], 2**31 + 1, "vocabulary size 2147483649"),
  ],
)
def test_refuses_to_write(
  tmp_path: Path, tokens: list[int], vocabulary_size: int, message: str
) -> None:
  with pytest.raises(DataError, match=message):
    _write(tmp_path / "a.bin", np.array(tokens, np.int64), vocabulary_size)
  assert not list(tmp_path.iterdir())


# Dies at the worst moment: all bytes written, the name not yet given.
KILLED_BEFORE_RENAME = """
import os, signal, sys
from pathlib import Path
from jaxpipe.data.files import atomic_file
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with atomic_file(Path(sys.argv[1])) as file:
  file.write(b"half of it")
"""


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_killed_writer_leaves_the_name_as_it_was(tmp_path: Path, before: bytes | None) -> None:
  path = tmp_path / "a.bin"
  if before is not None:
    path.write_bytes(before)
  command = [sys.executable, "-c", KILLED_BEFORE_RENAME, str(path)]
  done = subprocess.run(command, cwd=ROOT, timeout=60)
  assert done.returncode == -signal.SIGKILL
  assert (path.read_bytes() if path.exists() else None) == before


def test_failed_writer_cleans_up(tmp_path: Path) -> None:
  (tmp_path / "a.bin").write_bytes(b"what was there")
  with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.bin") as file:
    file.write(b"half of it")
    raise RuntimeError
  assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
  assert (tmp_path / "a.bin").read_bytes() == b"what was there"


def test_stretch_counts_from_the_file(tmp_path: Path) -> None:
  _write(tmp_path / "a.bin")
  part = open_bin(tmp_path / "a.bin").stretch(10, 50).stretch(5, 8)
  assert part.start == 15
  np.testing.assert_array_equal(part.tokens, [15, 16, 17])
