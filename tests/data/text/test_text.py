"""Text to bins: exact, cached by content, and refused with a line that says what to do."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.data import ByteTokenizer, DataError, TextData, open_bin, prepare_text, write_bin

TEXT = "".join(f"line {n} of a text, naïve as it is\n" for n in range(200))


@pytest.fixture
def source(tmp_path: Path) -> Path:
  path = tmp_path / "a.txt"
  path.write_text(TEXT)
  return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
  return tmp_path / "cache"


def _text(data: TextData) -> str:
  return "".join(data.tokenizer.decode(half.tokens) for half in (data.train, data.validation))


def _stamps(cache: Path) -> dict[str, int]:
  return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.9])
def test_split_is_the_tail_and_nothing_is_lost(
  source: Path, cache: Path, tokenizer: str, fraction: float
) -> None:
  data = prepare_text(source, tokenizer, cache, validation_fraction=fraction)
  assert _text(data) == TEXT
  validation = data.tokenizer.decode(data.validation.tokens)
  assert TEXT.endswith(validation) and validation.startswith("line ")
  # Within a line of what was asked for.
  assert abs(len(validation.encode()) - fraction * len(TEXT.encode())) < 40
  assert data.train.header.fingerprint == data.tokenizer.fingerprint


def test_long_lines_are_split_between_characters(source: Path, cache: Path) -> None:
  text = "é" * 1000 + "\nend\n"
  source.write_text(text)
  for fraction in (0.0501, 0.0506, 0.051):
    data = prepare_text(source, "byte", cache, validation_fraction=fraction)
    assert "\ufffd" not in data.tokenizer.decode(data.validation.tokens)
    assert _text(data) == text
    assert len(data.validation.tokens) > 90


def test_files_are_joined_in_order(tmp_path: Path, cache: Path) -> None:
  folder = tmp_path / "texts"
  folder.mkdir()
  (folder / "b.txt").write_text("second file\n" * 9)
  (folder / "a.txt").write_text("first file")  # no newline at its end
  (folder / "c.md").write_text("not a text")
  names = [folder / "a.txt", folder / "b.txt"]
  joined = "first file\n" + "second file\n" * 9
  for form in (folder, str(folder), names, ",".join(map(str, names)), f"{names[0]}, {names[1]},"):
    assert _text(prepare_text(form, "byte", cache)) == joined
  assert len(_stamps(cache)) == 2
  assert _text(prepare_text(names[::-1], "byte", cache)) == "second file\n" * 9 + "first file\n"


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
def test_unchanged_text_is_not_tokenised_again(source: Path, cache: Path, tokenizer: str) -> None:
  first = prepare_text(source, tokenizer, cache)
  stamps = _stamps(cache)
  source.touch()  # content decides, not the file's time
  second = prepare_text(source, tokenizer, cache)
  assert _stamps(cache) == stamps
  np.testing.assert_array_equal(first.train.tokens, second.train.tokens)


def test_every_change_makes_new_bins_and_keeps_the_old(source: Path, cache: Path) -> None:
  prepare_text(source, "byte", cache)
  stamps = _stamps(cache)
  modified = source.stat().st_mtime_ns
  source.write_text(TEXT.replace("line 7 ", "line 8 "))  # same length
  os.utime(source, ns=(modified, modified))  # and same time
  assert "line 8 of a text, naïve as it is\nline 8 " in _text(prepare_text(source, "byte", cache))
  assert len(_stamps(cache)) == 4
  prepare_text(source, "byte", cache, validation_fraction=0.2)
  assert len(_stamps(cache)) == 6
  prepare_text(source, "bpe:280", cache)
  after = _stamps(cache)
  assert len(after) == 9  # two bins and the trained tokenizer
  assert {name: after[name] for name in stamps} == stamps


def test_damaged_cache_is_repaired_aloud(
  source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
  path = prepare_text(source, "byte", cache).train.path
  data = path.read_bytes()
  path.write_bytes(data[:-3])
  with caplog.at_level(logging.WARNING):
    assert _text(prepare_text(source, "byte", cache)) == TEXT
  assert "cut short" in caplog.text
  assert path.read_bytes() == data


def test_bpe_learns_from_the_training_part_alone(tmp_path: Path, cache: Path) -> None:
  source = tmp_path / "a.txt"
  source.write_text(TEXT + "zyxwvu zyxwvu\n" * 200)
  data = prepare_text(source, "bpe:280", cache, validation_fraction=0.3)
  assert len(data.tokenizer.encode("zyxwvu")) == 6


def test_ready_bin_is_split_where_it_lies(tmp_path: Path, cache: Path) -> None:
  tokenizer = ByteTokenizer()
  path = tmp_path / "ready.bin"
  tokens = tokenizer.encode(TEXT)
  write_bin(path, tokens, vocabulary_size=256, fingerprint=tokenizer.fingerprint)
  data = prepare_text(path, "byte", cache)
  np.testing.assert_array_equal(np.concatenate([data.train.tokens, data.validation.tokens]), tokens)
  assert data.validation.start == len(data.train.tokens) == int(len(tokens) * 0.95)
  assert not cache.exists()


def test_ready_bin_of_another_tokenizer(source: Path, tmp_path: Path, cache: Path) -> None:
  train = prepare_text(source, "bpe:280", cache).train
  with pytest.raises(DataError, match=r"made by tokenizer [0-9a-f]{12}, but this run uses"):
    prepare_text(train.path, "byte", cache)
  with pytest.raises(DataError, match="cannot be trained on tokens"):
    prepare_text(train.path, "bpe:400", cache)
  with pytest.raises(DataError, match=r"cannot be joined"):
    prepare_text([train.path, source], "byte", cache)
  assert open_bin(train.path).header == train.header


BAD = {
  "empty": (b"", "no text in it"),
  "blank": (b" \n\n", "no text in it"),
  "latin1": ("naïve\n".encode("latin1"), r"byte 2 is 0xef, not UTF-8; convert"),
  "short": (b"a", "give 1 tokens, at least 2 are needed; use a longer --text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_text(source: Path, cache: Path, kind: str) -> None:
  content, message = BAD[kind]
  source.write_bytes(content)
  with pytest.raises(DataError, match=message) as caught:
    prepare_text(source, "byte", cache)
  assert "\n" not in str(caught.value)


def test_bad_sources(tmp_path: Path, cache: Path) -> None:
  with pytest.raises(DataError, match=r"nowhere\.txt: no such file or folder; check --text"):
    prepare_text(tmp_path / "nowhere.txt", "byte", cache)
  with pytest.raises(DataError, match=r"no \.txt file in this folder"):
    prepare_text(tmp_path, "byte", cache)
  with pytest.raises(DataError, match="no text is given"):
    prepare_text(" , ", "byte", cache)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_bad_fraction(source: Path, cache: Path, fraction: float) -> None:
  with pytest.raises(DataError, match="not between 0 and 1"):
    prepare_text(source, "byte", cache, validation_fraction=fraction)


def test_ready_bin_with_a_larger_vocabulary_than_its_tokenizer(tmp_path: Path, cache: Path) -> None:
  """The fingerprint alone would let it through, and the ids would be out of the model's range."""
  file, fingerprint = tmp_path / "v.bin", ByteTokenizer().fingerprint
  write_bin(file, np.arange(290), vocabulary_size=300, fingerprint=fingerprint)
  with pytest.raises(DataError, match="has a vocabulary of 300, but its tokenizer 256"):
    prepare_text(file, "byte", cache)
