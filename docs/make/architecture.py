"""Draws the package from its imports, and writes the table of its folders in docs/architecture.md.

    .venv/bin/python docs/make/architecture.py                 # checks, prints, draws and writes
    .venv/bin/python docs/make/architecture.py --root=FOLDER   # checks and prints another checkout

Prints modules, entries and arrows of every folder (`imports.py` beside this script says what they
are), then every circle and every upward arrow, and ends with status 1 where there is one. Takes
some seconds.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from architecture_picture import draw
from imports import LEVELS, TOP, Package, problems, read_package
from section import DOCS, write_section

TEXT = """\
| folder | modules | entries | arrows |
|---|---|---|---|
{rows}

*Modules*: all below the folder. *Entries*: what lies in it directly, modules and folders, which is
what one must know of at once. *Arrows*: pairs of entries of which one imports the other.
"""


def main() -> int:
  """Checks, prints, and for this checkout draws and writes; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--root", type=pathlib.Path, help="another checkout, which is only printed")
  root = parser.parse_args().root
  package = read_package(root or DOCS.parent)
  print("modules  entries  arrows  folder")
  for name, numbers in counts(package).items():
    print("{:7}  {:7}  {:6}  {}".format(*numbers, name))
  found = problems(package)
  print(*(found or ["no circle, no upward arrow"]), sep="\n")
  if found:
    return 1
  if root is None:
    draw(package, DOCS / "images" / "architecture.png")
    write_section("architecture.md", "architecture.py", table(package))
  return 0


def counts(package: Package) -> dict[str, tuple[int, int, int]]:
  """Returns modules, entries and arrows of every folder, by its path."""
  return {
    folder.replace(".", "/"): (
      len(package.modules(folder)),
      len(package.entries(folder)),
      len(package.arrows(folder)),
    )
    for folder in package.folders
  }


def table(package: Package) -> str:
  """Returns the section: folders in the order of levels."""
  now = counts(package)
  tops = [TOP, *(f"{TOP}/{name}" for names in reversed(LEVELS) for name in names)]
  lines = []
  for top in tops:
    for folder in now:
      if folder == top or (top != TOP and folder.startswith(f"{top}/")):
        lines.append(f"| `{folder}/` | {' | '.join(map(str, now[folder]))} |")
  return TEXT.format(rows="\n".join(lines))


if __name__ == "__main__":
  sys.exit(main())
