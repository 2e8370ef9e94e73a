"""Puts generated text into a page of docs/, so that several scripts can own parts of one page.

A page is written by hand, but for its sections. A section stands between two comments, which
Markdown does not show, and is named after the script that writes it:

    <!-- docs/make/memory.py -->
    ...
    <!-- end of docs/make/memory.py -->

To add one, put the two comments into the page and call `write_section` in the script.
"""

from __future__ import annotations

import pathlib

DOCS = pathlib.Path(__file__).resolve().parents[1]


def write_section(page: str, script: str, text: str) -> None:
  """Replaces a section of a page.

  Args:
    page: the page's name in docs/, such as `memory.md`.
    script: the script's name in docs/make/, such as `memory.py`, which names the section.
    text: what shall stand there, Markdown.

  Raises:
    ValueError: the page does not have the section exactly once.
  """
  path = DOCS / page
  before, _, after = _parts(path, script)
  path.write_text(f"{before}\n\n{text.strip()}\n\n{after}")


def read_section(page: str, script: str) -> str:
  """Returns what stands in a section of a page, without the blank lines around it.

  Args:
    page: the page's name in docs/.
    script: the script's name in docs/make/.

  Raises:
    ValueError: the page does not have the section exactly once.
  """
  return _parts(DOCS / page, script)[1].strip()


def _parts(path: pathlib.Path, script: str) -> tuple[str, str, str]:
  """Returns the page up to the section, the section, and the rest; each with its own comment."""
  begin, end = f"<!-- docs/make/{script} -->", f"<!-- end of docs/make/{script} -->"
  text = path.read_text()
  if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
    raise ValueError(f"{path.name} needs the lines {begin} and {end} once each, in this order")
  before, _, rest = text.partition(begin)
  section, _, after = rest.partition(end)
  return before + begin, section, end + after
