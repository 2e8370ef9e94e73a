"""Draws the package: top folders on levels, sub-folders in rows, every arrow downwards."""

from __future__ import annotations

import collections
import pathlib
import textwrap
from collections.abc import Collection
from typing import NamedTuple

import matplotlib.pyplot as plt
from imports import LEVELS, TOP, Arrows, Package, reached
from layout import GAP, Box, Layout, lay_out
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle


class Panel(NamedTuple):
  """A top folder in the picture.

  Attributes:
    purpose: what it is for, in a few words.
    colour: of its frame and arrows, and of the marks that stand for it in other panels.
    left, width: in inches.
  """

  purpose: str
  colour: str
  left: float
  width: float


# Inches: the picture; between levels and rows; a panel's head; a line of text, a letter, a mark.
WIDTH, BETWEEN_LEVELS, BETWEEN_ROWS, HEAD = 10.0, 0.45, 0.24, 0.5
LINE, LETTER, MARK = 0.16, 0.075, 0.13
PANELS = {
  "training": Panel("flags, plan, step, loop, checkpoints", "#e08214", 0.1, 9.8),
  "models": Panel("networks that ship", "#9970ab", 0.1, 3.5),
  "pipeline": Panel("one program of a stack and a schedule", "#d6604d", 3.8, 4.6),
  "stack": Panel("the user's modules as one stack", "#4d9221", 0.1, 5.6),
  "parallel": Panel("mesh axes; where arrays lie", "#35978f", 0.1, 2.4),
  "schedules": Panel("which device does what, in which order", "#4393c3", 2.7, 5.4),
  "data": Panel("files to batches", "#8c510a", 8.3, 1.6),
}
PURPOSE = {
  "training/aot": "compiled for absent chips",
  "training/command": "a task as a command",
  "training/flags": "options, settings, errors",
  "training/lm": "the language model's run",
  "training/loop": "step, loop, checkpoints",
  "training/plan": "schedule, mesh, optimizer",
  "training/processes": "several hosts",
  "training/tasks": "digits, translation",
  "models/diffusion": "DiT, flow",
  "models/huggingface": "checkpoints",
  "models/speech": "Deep Speech 2",
  "models/transformer": "decoder, experts",
  "models/vision": "ViT, AmoebaNet",
  "pipeline/compiled": "reads XLA's text",
  "pipeline/costs": "memory, packing, time",
  "pipeline/device": "a device's tick",
  "pipeline/layer": "splits into F, I, W",
  "pipeline/storage": "rings, pools, arenas",
  "pipeline/table": "schedule to ticks",
  "schedules/checks": "is it legal",
  "schedules/command": "command line",
  "schedules/drawing": "text, figures",
  "schedules/families": "named schedules",
  "schedules/partition": "layers to stages",
  "schedules/planning": "orders from costs",
  "schedules/solver": "search and proof",
  "schedules/transforms": "changes orders",
  "data/experiments": "data sets",
  "data/text": "tokens",
}
# Loose modules that have a box of their own, since merged with the others of their row they would
# seem to share an import that is theirs alone.
APART = {"pipeline": ("check",)}
# Arrows between panels, each at its place along the x axis; the legend names those that are left
# out, because other arrows lead there as well.
BETWEEN = (
  ("training", "models", 1.5),
  ("training", "pipeline", 5.9),
  ("training", "data", 9.1),
  ("models", "stack", 1.5),
  ("pipeline", "stack", 4.6),
  ("pipeline", "schedules", 6.9),
  ("stack", "parallel", 1.3),
)


LEGEND = (
  "Numbers in boxes count modules. A grey box: modules that lie",
  "beside the sub-folders, some of which may import others.",
  "An arrow: something in one box imports something in the",
  "other. Arrows to what other arrows reach are left out.",
  "A square: this box imports from the folder of that colour.",
  "Numbers at arrows count pairs of modules, one of which",
  "imports the other. Between folders are left out:",
)


def rows(package: Package, folder: str) -> dict[str, int]:
  """Returns the row of each entry of a folder: sub-folders by depth, loose modules between them.

  A sub-folder, or a module that stands apart, is one deeper than what it imports; any other module
  is as deep as the deepest. So every arrow leads to a lower row, except between loose modules of
  one row.

  Args:
    package: without circles.
    folder: dotted name.
  """
  imported = collections.defaultdict(set)
  for a, b in package.arrows(folder):
    imported[a].add(b)
  alone = {name: stands_alone(package, folder, name) for name in package.entries(folder)}

  def depth(name: str) -> int:
    return alone[name] + max(map(depth, imported[name]), default=0)

  found = {name: 2 * depth(name) - alone[name] for name in alone}
  numbers = sorted(set(found.values()))
  return {name: numbers.index(row) for name, row in found.items()}


def stands_alone(package: Package, folder: str, name: str) -> bool:
  """Whether an entry of a folder has a box of its own: a sub-folder, or one of `APART`."""
  top = folder.removeprefix(f"{TOP}.")
  return f"{folder}.{name}" in package.folders or name in APART.get(top, ())


def direct(arrows: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
  """Returns the arrows to what is reached in no other way; the others follow from them."""
  reach = reached(arrows)
  return sorted(
    (a, b)
    for a, b in arrows
    if not any(b in reach.get(c, ()) for other, c in arrows if other == a and c != b)
  )


class Inside(NamedTuple):
  """A panel's content, laid out.

  Attributes:
    layout: boxes by the name of a sub-folder, or of the first of a row's loose modules.
    lines: key of a box -> what is written in it.
    marks: key of a box -> the other top folders that it imports.
    heights: of the rows, lowest first, in inches.
  """

  layout: Layout
  lines: dict[str, list[str]]
  marks: dict[str, list[str]]
  heights: list[float]


def inside(package: Package, name: str) -> Inside:
  """Lays out a top folder's sub-folders and loose modules."""
  folder, width = f"{TOP}.{name}", PANELS[name].width - 0.3
  by_row = collections.defaultdict(list)
  for entry, number in rows(package, folder).items():
    by_row[number].append(entry)
  owner: dict[str, str] = {}  # entry -> key of its box
  lines, marks, boxes, heights = {}, {}, [], []
  for _, mine in sorted(by_row.items()):
    # Loose modules of a row share a box, which has the first one's name.
    owner |= {one: one if stands_alone(package, folder, one) else mine[0] for one in mine}
    free = 0.0  # inches that are left in this row; a full one goes on in the next
    for key in dict.fromkeys(owner[entry] for entry in mine):
      members = [entry for entry in mine if owner[entry] == key]
      marks[key] = others(package, name, members)
      beside = 0.1 + MARK * len(marks[key])  # inches beside the first line that the marks take
      if f"{folder}.{key}" in package.folders:
        count = len(package.modules(f"{folder}.{key}"))
        lines[key] = [f"{key}/  {count}", PURPOSE.get(f"{name}/{key}", "")]
      else:
        lines[key] = textwrap.wrap(", ".join(members), int((width - 0.2 - beside) / LETTER))
      wide = max(LETTER * len(line) for line in lines[key]) + 0.2
      wide = max(wide, LETTER * len(lines[key][0]) + 0.2 + beside)
      if free < wide:
        heights.append(0.0)
        free = width
      heights[-1] = max(heights[-1], LINE * len(lines[key]) + 0.1)
      free -= wide + GAP
      boxes.append(Box(key, len(heights) - 1, wide))
  # Which arrows follow from others is asked of entries. Asked of boxes, what one module imports
  # would count as reached where another module of its box reaches it.
  arrows = {(owner[a], owner[b]) for a, b in direct(package.arrows(folder))}
  return Inside(
    lay_out(boxes, sorted((a, b) for a, b in arrows if a != b), width), lines, marks, heights
  )


def others(package: Package, name: str, entries: Collection[str]) -> list[str]:
  """Returns the other top folders that some entries of a top folder import."""
  within = tuple(f"{TOP}.{name}.{entry}" for entry in entries)
  found = {
    imported.split(".")[1]
    for module, names in package.imports.items()
    if module in within or module.startswith(tuple(f"{one}." for one in within))
    for imported in names
    if imported != TOP
  }
  return [other for other in PANELS if other in found and other != name]


def draw(package: Package, path: pathlib.Path) -> None:
  """Draws the package into a PNG file."""
  content = {name: inside(package, name) for name in PANELS}
  height = {
    name: HEAD + sum(content[name].heights) + BETWEEN_ROWS * len(content[name].heights)
    for name in PANELS
  }
  tops: dict[str, float] = {}
  y = 0.1
  for names in LEVELS:
    top = y + max(height[name] for name in names)
    tops |= dict.fromkeys(names, top)
    y = top + BETWEEN_LEVELS
  total = y - BETWEEN_LEVELS + 0.1
  figure = plt.figure(figsize=(WIDTH, total))
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(0, WIDTH), ylim=(0, total))
  axes.axis("off")
  counts = package.arrows(TOP)
  for a, b, x in BETWEEN:
    bottom = tops[a] - height[a]
    line(axes, (x, bottom), (x, tops[b]), "0.3", 2.2)
    write(axes, x + 0.1, bottom - BETWEEN_LEVELS / 2, f"{counts[a, b]} imports", "0.3")
  for name in PANELS:
    draw_panel(axes, package, name, content[name], tops[name], height[name])
  for i, text in enumerate((*LEGEND, *left_out(counts))):
    write(axes, 5.5, total - 0.3 - 0.2 * i, text, "0.3", size=9)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def left_out(counts: Arrows) -> list[str]:
  """Returns lines of the legend: the arrows between top folders that are not drawn."""
  drawn = {(a, b) for a, b, _ in BETWEEN}
  found: dict[str, list[str]] = collections.defaultdict(list)
  for (a, b), count in sorted(counts.items()):
    if (a, b) not in drawn:
      found[a].append(f"{b} {count}")
  return [f"{a} to {', '.join(names)}" for a, names in found.items()]


def draw_panel(
  axes: Axes, package: Package, name: str, content: Inside, top: float, height: float
) -> None:
  """Draws a top folder: its frame, its boxes in rows, and the arrows between them."""
  panel, layout = PANELS[name], content.layout
  left = panel.left + 0.15
  frame(axes, (panel.left, top - height, panel.width, height), panel.colour, 1.5)
  mark(axes, left, top - 0.2, panel.colour, 0.14)
  title = f"{name}/  {len(package.modules(f'{TOP}.{name}'))}"
  write(axes, left + 0.22, top - 0.2, title, size=11.5, weight="bold")
  write(axes, left, top - 0.44, panel.purpose, "0.2", size=9)
  # Of each box: its middle along x, its lower and its upper edge.
  at: dict[str, tuple[float, float, float]] = {}
  low = top - height + BETWEEN_ROWS / 2
  for n, tall in enumerate(content.heights):
    for box in layout.boxes.values():
      if box.row == n:
        at[box.key] = (left + layout.x[box.key], low, low + tall)
    low += tall + BETWEEN_ROWS
  for a, b in layout.links:
    (xa, ya, _), (xb, _, yb) = at[a], at[b]
    start = towards(xa, xb, layout.boxes[a].width), ya
    end = towards(xb, start[0], layout.boxes[b].width), yb
    line(axes, start, end, panel.colour, 1.3, head=not layout.boxes[b].bend)
    if layout.boxes[b].bend:  # it passes beside the boxes of its row, straight down
      line(axes, end, (end[0], at[b][1]), panel.colour, 1.3, head=False)
  for key, lines in content.lines.items():
    middle, bottom, high = at[key]
    width = layout.boxes[key].width
    is_folder = f"{TOP}.{name}.{key}" in package.folders
    place = (middle - width / 2, bottom, width, high - bottom)
    frame(axes, place, "0.3" if is_folder else "0.75", 1)
    for i, text in enumerate(lines):
      weight = "bold" if is_folder and i == 0 else "normal"
      write(axes, place[0] + 0.1, high - 0.13 - LINE * i, text, weight=weight)
    for i, other in enumerate(reversed(content.marks[key])):
      mark(axes, place[0] + width - MARK * (i + 1) - 0.04, high - 0.13, PANELS[other].colour, 0.1)


def towards(middle: float, other: float, width: float) -> float:
  """Returns the place on a box's edge, around its middle, that lies nearest to another x."""
  free = max(width / 2 - 0.15, 0)
  return min(max(other, middle - free), middle + free)


def frame(axes: Axes, at: tuple[float, float, float, float], colour: str, width: float) -> None:
  """Draws a white box with round corners; `at` is left, bottom, width and height."""
  left, bottom, wide, tall = at
  box = FancyBboxPatch((left, bottom), wide, tall, boxstyle="round,pad=0,rounding_size=0.06")
  box.set(facecolor="white", edgecolor=colour, linewidth=width)
  axes.add_patch(box)


def mark(axes: Axes, left: float, middle: float, colour: str, size: float) -> None:
  """Draws the square that stands for a top folder."""
  axes.add_patch(Rectangle((left, middle - size / 2), size, size, color=colour, linewidth=0))


def write(
  axes: Axes,
  x: float,
  y: float,
  text: str,
  colour: str = "black",
  *,
  size: float = 8.5,
  weight: str = "normal",
) -> None:
  """Writes a line of text, its left end at x and its middle at y."""
  axes.text(x, y, text, color=colour, fontsize=size, weight=weight, va="center")


def line(
  axes: Axes,
  start: tuple[float, float],
  end: tuple[float, float],
  colour: str,
  width: float,
  *,
  head: bool = True,
) -> None:
  """Draws a straight line, with an arrow's head at its end or without."""
  look = dict(arrowstyle="-|>" if head else "-", color=colour, lw=width, shrinkA=0, shrinkB=0)
  axes.annotate("", end, start, arrowprops=look)
