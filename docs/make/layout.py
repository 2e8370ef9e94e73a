"""Where boxes and arrows of a layered drawing stand: every arrow leads to a lower row.

The usual way (Sugiyama et al., 1981): boxes in rows by depth; an arrow over several rows gets a
bend in each row that it passes, shared with the other arrows to the same box; then every box and
bend moves towards the middle of what it is connected to, as far as its row has place.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

GAP = 0.22  # inches between neighbours of a row
ROUNDS = 20  # of moving, down and up; more change nothing that can be seen


@dataclasses.dataclass(frozen=True)
class Box:
  """What stands in a row.

  Attributes:
    key: names it; arrows are pairs of keys.
    row: 0 is the lowest.
    width: in inches.
    bend: whether it is not a box but a place that an arrow passes.
  """

  key: str
  row: int
  width: float
  bend: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
  """Boxes with places.

  Attributes:
    boxes: key -> box, bends included.
    x: key -> middle of the box, in inches from the left.
    links: (upper, lower) keys of neighbouring rows, which are what the arrows consist of.
  """

  boxes: Mapping[str, Box]
  x: Mapping[str, float]
  links: Collection[tuple[str, str]]


def lay_out(boxes: Collection[Box], arrows: Collection[tuple[str, str]], width: float) -> Layout:
  """Places boxes and bends.

  Args:
    boxes: with their rows.
    arrows: pairs of keys, from a higher row to a lower one.
    width: of all, in inches.
  """
  all_boxes = {box.key: box for box in boxes}
  links = set()
  for a, b in arrows:
    upper = a
    for row in range(all_boxes[a].row - 1, all_boxes[b].row, -1):
      bend = Box(f"{b}@{row}", row, 0.05, bend=True)
      all_boxes[bend.key] = bend
      links.add((upper, bend.key))
      upper = bend.key
    links.add((upper, b))
  rows: dict[int, list[Box]] = collections.defaultdict(list)
  for box in all_boxes.values():
    rows[box.row].append(box)
  x = {box.key: width * (i + 0.5) / len(row) for row in rows.values() for i, box in enumerate(row)}
  beside = collections.defaultdict(list)
  for a, b in links:
    beside[a].append(b)
    beside[b].append(a)
  for _ in range(ROUNDS):
    for number in (*sorted(rows, reverse=True), *sorted(rows)):
      wanted = {
        box: sum(x[other] for other in beside[box.key]) / len(beside[box.key])
        if beside[box.key]
        else x[box.key]
        for box in rows[number]
      }
      x |= {box.key: middle for box, middle in _apart(wanted, width)}
  return Layout(all_boxes, x, links)


def _apart(wanted: Mapping[Box, float], width: float) -> Iterator[tuple[Box, float]]:
  """Yields the boxes of a row with middles near those wanted, `GAP` apart and within the width."""
  row = sorted(wanted, key=lambda box: (wanted[box], box.key))
  # The least and the largest middle of each that leave place for its neighbours.
  least: list[float] = []
  most: list[float] = []
  edge = 0.0
  for box in row:
    least.append(edge + box.width / 2)
    edge += box.width + GAP
  edge = width
  for box in reversed(row):
    most.insert(0, edge - box.width / 2)
    edge -= box.width + GAP
  # Pushed apart to the right, and to the left; the mean of both is as far apart.
  right: list[float] = []
  left: list[float] = []
  edge = -math.inf
  for box, low, high in zip(row, least, most, strict=True):
    right.append(min(max(wanted[box], low, edge + box.width / 2), high))
    edge = right[-1] + box.width / 2 + GAP
  edge = math.inf
  for box, low, high in zip(reversed(row), reversed(least), reversed(most), strict=True):
    left.insert(0, max(min(wanted[box], high, edge - box.width / 2), low))
    edge = left[0] - box.width / 2 - GAP
  yield from zip(row, ((a + b) / 2 for a, b in zip(left, right, strict=True)), strict=True)
