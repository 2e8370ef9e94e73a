"""Reads the cross-references of Roget's Thesaurus of 1879 as a graph; see data/roget/README.md.

The graph has 1,022 headings, and 3,648 pairs of which one refers to the other. The thesaurus puts
every heading into one of six classes, which are to be predicted.
"""

from __future__ import annotations

import gzip
import pathlib
import re

import numpy as np

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.graph import Graph, spelling

CLASSES = ("abstract relations", "space", "matter", "intellect", "volition", "affections")
# The first heading of each class but the first: space, materiality, intellect, will, affections.
_STARTS = (186, 323, 459, 612, 837)


def load_roget(path: pathlib.Path, feature_width: int = 512) -> Graph:
  """Reads the file that ships in data/roget.

  Args:
    path: `roget_dat.txt.gz`.
    feature_width: F; features are the spelling of the heading (`indiscrimination`).

  Raises:
    DataError: a line that is not `NUMBER HEADING: NUMBERS`, or numbers that do not count up.
  """
  with gzip.open(path, "rt", encoding="latin-1") as file:
    text = "".join(line for line in file if not line.startswith("*"))
  words: list[str] = []
  pairs: set[tuple[int, int]] = set()
  for line in text.replace("\\\n", " ").splitlines():
    found = re.fullmatch(r"(\d+)([^:\d]+):([\d ]*)", line)
    if not found or int(found[1]) != len(words) + 1:
      raise DataError(f"{path}: {line[:40]!r} is not heading {len(words) + 1}; restore the file")
    words.append(found[2])
    one = len(words) - 1
    pairs |= {(min(one, two), max(one, two)) for two in (int(n) - 1 for n in found[3].split())}
  return Graph(
    features=spelling(words, feature_width),
    labels=np.digitize(np.arange(1, len(words) + 1), _STARTS).astype(np.int32),
    edges=np.array(sorted(pair for pair in pairs if pair[0] != pair[1])),
  )
