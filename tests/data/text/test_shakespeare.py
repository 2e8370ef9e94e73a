"""The text that ships is the text that its README describes, and is nothing but text."""

import hashlib
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[3] / "data" / "shakespeare"


def test_is_the_file_that_its_readme_describes() -> None:
  data = (FOLDER / "plays.txt").read_bytes()
  readme = (FOLDER / "README.md").read_text()
  assert hashlib.sha256(data).hexdigest() in readme
  assert f"{len(data):,} bytes" in readme
  assert 1_000_000 <= len(data) <= 1_150_000


def test_is_plain_text_without_notices() -> None:
  text = (FOLDER / "plays.txt").read_text("ascii")
  assert not re.search(r"gutenberg|trademark|copyright|etext|http|www\.", text, re.I)
  assert not re.search(r"\r|\t|[ ]\n|\n{3}", text)
  assert text.count("\nby William Shakespeare\n") == 8


def test_cleaning_cuts_notices_or_stops() -> None:
  make = runpy.run_path(str(FOLDER / "make.py"))
  marked = (
    b"Head\r\n*** START OF THIS EBOOK ***\r\nACT I. \r\n\r\n\r\n\r\nHold!\r\n*** END OF IT\r\nTail"
  )
  assert make["clean"](marked, "play") == "ACT I.\n\nHold!\n"
  for notice in (b"the Project Gutenberg Etext", b"by license, License v2", b"http://a.b"):
    with pytest.raises(ValueError, match="is left in the text"):
      make["clean"](b"ACT I.\n" + notice + b"\n", "play")
  with pytest.raises(ValueError, match="sha256 is"):
    make["build"](FOLDER / "README.md")


def test_counts_of_pairs_of_bytes_leave_what_the_readme_says() -> None:
  """The baseline of the language model: nats per byte of the last twentieth, as in training."""
  text = np.frombuffer((FOLDER / "plays.txt").read_bytes(), np.uint8)
  cut = len(text) * 19 // 20
  single = np.bincount(text[:cut], minlength=256) + 0.5
  pairs = np.zeros((256, 256)) + 2 * single / single.sum()
  np.add.at(pairs, (text[: cut - 1], text[1:cut]), 1)
  before, after = text[cut:-1], text[cut + 1 :]
  nats = -np.log(pairs[before, after] / pairs[before].sum(-1)).mean()
  assert f"{nats:.2f}, counts of pairs of bytes" in (FOLDER.parents[1] / "README.md").read_text()
