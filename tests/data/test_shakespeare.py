"""The text that ships is the text that its README describes, and is nothing but text."""

import hashlib
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "data" / "shakespeare"


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
