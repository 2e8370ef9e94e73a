"""Who imports whom: the modules of a checkout as a graph, folder by folder.

An *arrow* of a folder leads from one of its entries (a module, or a folder with all below it) to
another that it imports, at whatever place in the file, `TYPE_CHECKING` included. Sources are
parsed, never imported. A folder's own `__init__` is no entry of it.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import pathlib
from collections.abc import Collection, Iterator, Mapping

TOP = "jaxpipe"
# The top folders, lowest level first. An arrow must lead to a lower level: folders of one level do
# not know each other. `tests/test_imports.py` says more narrowly what may be imported.
LEVELS = (("schedules", "parallel", "data"), ("stack",), ("models", "pipeline"), ("training",))

Arrows = Mapping[tuple[str, str], int]  # (importing, imported) -> how many pairs of modules


@dataclasses.dataclass(frozen=True)
class Package:
  """The modules below a checkout's package.

  Attributes:
    imports: dotted name of a module -> the modules of ours that it imports; a folder's name stands
      for its `__init__`.
    folders: dotted names of the folders, sorted.
  """

  imports: Mapping[str, Collection[str]]
  folders: tuple[str, ...]

  def modules(self, folder: str) -> list[str]:
    """Returns the modules below a folder, without the `__init__`s of folders."""
    return [m for m in self.imports if m.startswith(f"{folder}.") and m not in self.folders]

  def entries(self, folder: str) -> list[str]:
    """Returns the names of what lies in a folder: modules and folders, sorted."""
    return sorted({_entry(folder, module) for module in self.modules(folder)})

  def arrows(self, folder: str) -> dict[tuple[str, str], int]:
    """Returns the arrows between a folder's entries."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for module, imported in self.imports.items():
      below = [name for name in (module, *imported) if name.startswith(f"{folder}.")]
      if module in below:
        pair = [(_entry(folder, module), _entry(folder, name)) for name in below[1:]]
        found.update((a, b) for a, b in pair if a != b)
    return dict(found)


def read_package(root: pathlib.Path) -> Package:
  """Reads the package of a checkout.

  Args:
    root: the checkout, in which `jaxpipe/` lies.
  """
  sources, folders = {}, []
  for path in sorted((root / TOP).rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    if path.name == "__init__.py":
      name = name.removesuffix(".__init__")
      folders.append(name)
    sources[name] = path.read_text()
  imports = {name: frozenset(_imported(text, sources)) - {name} for name, text in sources.items()}
  return Package(imports, tuple(folders))


def _imported(text: str, modules: Collection[str]) -> Iterator[str]:
  """Yields those of `modules` that a source imports."""
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        # `from a import b` imports the module a.b where there is one, else the module a.
        name = f"{node.module}.{alias.name}"
        yield from {name if name in modules else f"{node.module}"} & set(modules)


def _entry(folder: str, module: str) -> str:
  """Returns the name of the entry of a folder in which a module below it lies."""
  return module.removeprefix(f"{folder}.").partition(".")[0]


def reached(arrows: Collection[tuple[str, str]]) -> dict[str, set[str]]:
  """Returns what each name reaches over one arrow or several."""
  to: dict[str, set[str]] = collections.defaultdict(set)
  for a, b in arrows:
    to[a].add(b)
  found = {}
  for name in to:
    seen, waiting = set(), list(to[name])
    while waiting:
      if (other := waiting.pop()) not in seen:
        seen.add(other)
        waiting.extend(to.get(other, ()))
    found[name] = seen
  return found


def circles(arrows: Collection[tuple[str, str]]) -> list[list[str]]:
  """Returns the groups of names that all reach each other, each sorted."""
  reach = reached(arrows)
  groups = {
    tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in reach if a in reach[a]
  }
  return sorted(map(list, groups))


def upward(arrows: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
  """Returns the arrows between top folders that do not lead to a lower level."""
  level = {name: i for i, names in enumerate(LEVELS) for name in names}
  return sorted((a, b) for a, b in arrows if level.get(b, 0) >= level.get(a, 0))


def problems(package: Package) -> list[str]:
  """Returns one line for each circle, of modules or of a folder's entries, and upward arrow."""
  pairs = [(module, name) for module, names in package.imports.items() for name in names]
  found = [f"circle of modules: {' '.join(group)}" for group in circles(pairs)]
  for folder in package.folders:
    found += [f"circle in {folder}: {' '.join(group)}" for group in circles(package.arrows(folder))]
  return found + [f"upward: {a} imports {b}" for a, b in upward(package.arrows(TOP))]
