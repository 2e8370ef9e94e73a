"""Imports go one way: parts that must not know each other do not, and JAX's private parts stay so.

The tables below say which part, or folder of a part, may import which others; beyond that, no
modules import one another in a circle, and no folder grows large or lacks a word on where to begin.
Sources are parsed, never imported, so that imports inside functions and under `TYPE_CHECKING`
count as well.
"""

import ast
import collections
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# What a schedule *is*; the modules beside these say which ones there are.
SCHEDULE_VALUES = {
  f"jaxpipe.schedules{module}"
  for module in (
    "",
    ".actions",
    ".checks.",
    ".costs",
    ".peaks",
    ".placement",
    ".schedule",
    ".simulate",
    ".ticks",
    ".walk",
  )
}

# Part -> the modules of ours that it may import, besides its own. An ending dot admits everything
# below. A part that is not listed fails the test: say here where it stands.
MAY_IMPORT = {
  "schedules": set(),
  "data": set(),
  "parallel": set(),
  "stack": {"jaxpipe.parallel."},
  "models": {"jaxpipe.parallel.", "jaxpipe.stack."},
  "pipeline": {
    "jaxpipe.parallel.",
    "jaxpipe.stack.",
    "jaxpipe.schedules.partition.",
    *SCHEDULE_VALUES,
  },
  "training": {
    "jaxpipe.data.",
    "jaxpipe.models.",
    "jaxpipe.parallel.",
    "jaxpipe.pipeline.",
    "jaxpipe.schedules.",
    "jaxpipe.stack.",
  },
}

# Folder -> what it may import of its own part, besides itself; one that is not listed, everything.
MAY_IMPORT_OF_ITS_PART = {
  "jaxpipe.pipeline.layer.": set(),
  "jaxpipe.pipeline.table.": set(),
  "jaxpipe.pipeline.storage.": {"jaxpipe.pipeline.layer.", "jaxpipe.pipeline.table."},
  "jaxpipe.pipeline.device.": {
    "jaxpipe.pipeline.layer.",
    "jaxpipe.pipeline.storage.",
    "jaxpipe.pipeline.table.",
  },
}

# Folder -> the only modules that may import it, besides its own.
ONLY_IMPORTED_BY = {
  # It reads compiled programs and reports on them: nothing that makes a program depends on that.
  "jaxpipe.pipeline.compiled.": {"jaxpipe.training.aot.", "jaxpipe.training.command.dry_run"},
}

# Part -> what it must do without; "" stands for all of jaxpipe.
MAY_NOT_IMPORT = {
  "": {"experiments", "launch", "tests", "torch", "tensorflow"},
  "schedules": {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"},
  "data": {"jax", "jaxlib", "flax", "optax", "orbax"},
}


# What a folder of jaxpipe may hold before it wants folders of its own.
MOST_MODULES = 20

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def nodes(source: str, *, of_functions: bool = True) -> Iterator[ast.AST]:
  """Yields the nodes of a source, those inside functions only if `of_functions`."""
  todo: list[ast.AST] = [ast.parse(source)]
  for node in todo:  # which grows on the way
    yield node
    if of_functions or not isinstance(node, FUNCTIONS):
      todo += ast.iter_child_nodes(node)


def imports(
  source: str, module: str, modules: set[str], *, of_functions: bool = True
) -> Iterator[str]:
  """Yields the modules that a source imports; `modules` are ours, apart from their values."""
  folder = module if f"{module}.__init__" in modules else module.rpartition(".")[0]
  for node in nodes(source, of_functions=of_functions):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:  # `from ..models import x`: each dot after the first goes up one folder
        above = folder.split(".")[: folder.count(".") + 2 - node.level]
        base = ".".join([*above, base]).rstrip(".")
      for alias in node.names:
        name = f"{base}.{alias.name}"
        # `from jaxpipe.schedules import Schedule` depends on the module that it names, no further.
        yield base if base.startswith("jaxpipe") and name not in modules else name


def _is_private(name: str) -> bool:
  return name.startswith("_") and not name.endswith("__")


def private_jax(source: str) -> Iterator[str]:
  """Yields the underscored names that a source takes from JAX, imported or as attributes."""
  stands_for = {}  # a local name -> what it was imported as
  attributes = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      for alias in node.names:
        stands_for[alias.asname or alias.name] = alias.name
    elif isinstance(node, ast.ImportFrom) and not node.level:
      for alias in node.names:
        stands_for[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Attribute) and _is_private(node.attr):
      attributes.append(ast.unparse(node).partition("."))
  taken = [f"{stands_for.get(head, head)}.{rest}" for head, _, rest in attributes]
  for name in [*stands_for.values(), *taken]:
    first, *rest = name.split(".")
    if first in ("jax", "jaxlib") and any(map(_is_private, rest)):
      yield name


def _among(name: str, entries: Collection[str]) -> bool:
  """Whether a module is one of some entries, or below one that ends in a dot."""
  below = tuple(entry for entry in entries if entry.endswith("."))
  return name in entries or f"{name}.".startswith(below)


def _is_allowed(module: str, part: str, name: str) -> bool:
  """Whether a module, of a part, may import another of ours by the tables above."""
  # What lies in the top folder itself (the public names) may know every part.
  allowed = {f"jaxpipe.{part}.", *MAY_IMPORT.get(part, ())} if part else {"jaxpipe."}
  if not _among(name, allowed):
    return False
  for folder, others in MAY_IMPORT_OF_ITS_PART.items():
    if _among(module, {folder}) and _among(name, {f"jaxpipe.{part}."}):
      return _among(name, {folder, *others})
  return all(
    _among(module, {folder, *readers}) or not _among(name, {folder})
    for folder, readers in ONLY_IMPORTED_BY.items()
  )


def violations(source: str, module: str, modules: set[str]) -> list[str]:
  """Returns one line per import of `module` that the tables above do not allow."""
  folder = module if f"{module}.__init__" in modules else module.rpartition(".")[0]
  part = folder.removeprefix("jaxpipe").removeprefix(".").split(".")[0]
  found = [f"{module} takes the private {name}" for name in private_jax(source)]
  if part and part not in MAY_IMPORT:
    found.append(f"{module} is in a part that MAY_IMPORT does not place")
  forbidden = MAY_NOT_IMPORT[""] | MAY_NOT_IMPORT.get(part, set())
  for name in imports(source, module, modules):
    top = name.split(".")[0]
    if top in forbidden or (top == "jaxpipe" and not _is_allowed(module, part, name)):
      found.append(f"{module} imports {name}")
  return found


def find_circle(sources: Mapping[str, str], modules: set[str]) -> list[str]:
  """Returns modules each of which imports the next, the last being the first; none, if none do.

  Imports under `TYPE_CHECKING` count, those inside functions do not. Nor does it count that to
  import a module runs the `__init__` of its folder.

  Args:
    sources: dotted name -> source, that of a package with `.__init__`.
    modules: the names that `imports` needs.
  """
  arrows = {
    (name := module.removesuffix(".__init__")): sorted(
      set(imports(source, name, modules, of_functions=False))
    )
    for module, source in sources.items()
  }
  done = set()

  def follow(module: str, way: list[str]) -> list[str]:
    if module in way:
      return [*way[way.index(module) :], module]
    if module not in done:
      for other in arrows.get(module, ()):
        if circle := follow(other, [*way, module]):
          return circle
    done.add(module)
    return []

  return next(filter(None, (follow(module, []) for module in arrows)), [])


def faults_of_folder(folder: str, init: str, modules: Collection[str]) -> list[str]:
  """Returns one line per rule that a folder breaks.

  Args:
    folder: dotted name.
    init: source of its `__init__`.
    modules: names of the other modules in it.
  """
  found = []
  if len(modules) > MOST_MODULES:
    found.append(f"{folder} has {len(modules)} modules: divide it into folders")
  if folder.count(".") < 2:  # a whole part: which of its folders comes first, README says
    return found
  named = re.findall(r"`(\w+)\.py`", ast.get_docstring(ast.parse(init)) or "")
  if not named:
    found.append(f"{folder}/__init__.py says of no module, by `NAME.py`, to open it first")
  return found + [f"{folder} has no {name}.py" for name in named if name not in modules]


def read_modules() -> dict[str, str]:
  """Returns the source of every module of jaxpipe by its dotted name."""
  sources = {}
  for path in sorted((ROOT / "jaxpipe").rglob("*.py")):
    sources[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text()
  return sources


def in_folders(modules: Collection[str]) -> dict[str, list[str]]:
  """Returns folder -> names of the modules in it, without its `__init__`."""
  found = collections.defaultdict(list)
  for module in modules:
    folder, _, name = module.rpartition(".")
    found[folder] += [name] if name != "__init__" else []
  return dict(found)


SOURCES = read_modules()
# A package goes by its own name, and by its __init__, which tells it from a plain module.
MODULES = {*SOURCES, *(name.removesuffix(".__init__") for name in SOURCES)}


@pytest.mark.smoke
@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module: str) -> None:
  assert violations(SOURCES[module], module.removesuffix(".__init__"), MODULES) == []


@pytest.mark.smoke
def test_no_modules_import_one_another_in_a_circle() -> None:
  assert find_circle(SOURCES, MODULES) == []


FOLDERS = in_folders(SOURCES)


@pytest.mark.smoke
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_small_and_says_where_to_begin(folder: str) -> None:
  assert faults_of_folder(folder, SOURCES[f"{folder}.__init__"], FOLDERS[folder]) == []


TREE = {
  "jaxpipe",
  "jaxpipe.__init__",
  "jaxpipe.schedules",
  "jaxpipe.schedules.__init__",
  "jaxpipe.schedules.families.gpipe",
  "jaxpipe.schedules.schedule",
  "jaxpipe.models",
  "jaxpipe.models.__init__",
  "jaxpipe.stack.stack",
  "jaxpipe.models.transformer.decoder",
  "jaxpipe.pipeline",
  "jaxpipe.pipeline.__init__",
  "jaxpipe.pipeline.executor",
  "jaxpipe.pipeline.compiled",
  "jaxpipe.pipeline.compiled.__init__",
  "jaxpipe.pipeline.compiled.step",
}


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("jaxpipe.schedules.families.gpipe", "import jax"),
    ("jaxpipe.schedules.families.gpipe", "def late():\n  from jax import numpy"),
    ("jaxpipe.schedules.families.gpipe", "import jaxpipe"),
    ("jaxpipe.schedules", "from ..models import stack"),
    ("jaxpipe.stack.stack", "from jaxpipe.pipeline import executor"),
    ("jaxpipe.stack.stack", "from jaxpipe import pipeline"),
    ("jaxpipe.stack.stack", "from ..pipeline.executor import run"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.schedules.families import gpipe"),
    ("jaxpipe.pipeline.executor", "import jaxpipe.schedules.families.gpipe as g"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.models.transformer.decoder import Block"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.models import transformer"),
    ("jaxpipe.models.transformer.decoder", "from jaxpipe.pipeline import executor"),
    ("jaxpipe.models.transformer.decoder", "from jaxpipe.pipeline.layer import residuals"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.pipeline.compiled.step import read_compiled"),
    ("jaxpipe.pipeline.executor", "from .compiled import step"),
    ("jaxpipe.pipeline.costs.memory", "def late():\n  import jaxpipe.pipeline.compiled.step"),
    ("jaxpipe.pipeline.layer.split", "from jaxpipe.pipeline.device.now import Now"),
    ("jaxpipe.pipeline.layer.split", "from jaxpipe.pipeline.executor import run"),
    ("jaxpipe.pipeline.layer.split", "from jaxpipe.pipeline.table.program import Program"),
    ("jaxpipe.pipeline.table.lower", "from jaxpipe.pipeline.costs import memory"),
    ("jaxpipe.pipeline.table.lower", "from jaxpipe import pipeline"),
    ("jaxpipe.pipeline.storage.pools", "from jaxpipe.pipeline.compiled.step import Memory"),
    ("jaxpipe.pipeline.storage", "from jaxpipe.pipeline.device import carry"),
    ("jaxpipe.pipeline.device.device", "from jaxpipe.pipeline.costs.memory import report"),
    ("jaxpipe.pipeline.device.device", "from jaxpipe.pipeline.compiled import step"),
    ("jaxpipe.pipeline.device.device", "from ..executor import run"),
    ("jaxpipe.pipeline.device.device", "from jaxpipe.pipeline import timeline"),
    ("jaxpipe.training.loop.loop", "from jaxpipe.pipeline.compiled.step import read_compiled"),
    ("jaxpipe.pipeline.executor", "from jax._src import core"),
    ("jaxpipe.pipeline.executor", "import jax\njax._src.core.Jaxpr"),
    ("jaxpipe.pipeline.executor", "from jax import lax\nlax._reduce_sum"),
    ("jaxpipe.data.text.bins", "from jaxpipe.training import loop"),
    ("jaxpipe.training.loop.loop", "import torch.nn"),
    ("jaxpipe.training.loop.loop", "from experiments import lm"),
    ("jaxpipe.newcomer.thing", "import math"),
    ("jaxpipe.shortcuts", "from experiments import lm"),
  ],
)
def test_a_planted_violation_is_caught(module: str, source: str) -> None:
  assert len(violations(source, module, TREE)) == 1


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("jaxpipe", "from jaxpipe.training import loop"),
    ("jaxpipe.schedules", "from .gpipe import gpipe"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.schedules import Schedule"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.schedules.schedule import Schedule"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.stack.stack import LayerStack"),
    ("jaxpipe.pipeline.executor", "import jax\nfrom jax.extend import core\njax.__version__"),
    ("jaxpipe.pipeline.executor", "from jaxpipe.pipeline.device.device import Device"),
    ("jaxpipe.pipeline.device.device", "from jaxpipe.pipeline.table.program import Program"),
    ("jaxpipe.pipeline.device.device", "from jaxpipe.pipeline.device import carry"),
    ("jaxpipe.pipeline.device.device", "from jaxpipe.stack.stack import LayerStack"),
    ("jaxpipe.pipeline.compiled.step", "from jaxpipe.pipeline.table.lower import lower"),
    ("jaxpipe.training.aot.report", "from jaxpipe.pipeline.compiled.step import Memory"),
    ("jaxpipe.training.loop.loop", "from jaxpipe.schedules import gpipe\nimport optax"),
  ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
  assert violations(source, module, TREE) == []


# Modules by their names below jaxpipe; in their sources, J stands for jaxpipe.
@pytest.mark.parametrize(
  ("sources", "circle"),
  [
    ({"a": "import J.b", "b": "import J.a"}, ["a", "b", "a"]),
    ({"a": "import J.b", "b": "from J.c import x", "c": "from J.b import y"}, ["b", "c", "b"]),
    ({"a": "if TYPE_CHECKING:\n  import J.b", "b": "import J.a"}, ["a", "b", "a"]),
    ({"p.__init__": "from J.p.a import x", "p.a": "from J.p import y"}, ["p", "p.a", "p"]),
    (
      {"p.__init__": "", "p.a": "from . import b", "p.b": "from .a import x"},
      ["p.a", "p.b", "p.a"],
    ),
    ({"a": "import J.b\nimport J.c", "b": "import J.c", "c": "def f():\n  import J.a"}, []),
    ({"p.__init__": "from J.p.a import x", "p.a": "from J.p.b import y", "p.b": ""}, []),
  ],
)
def test_a_planted_circle_is_found(sources: dict[str, str], circle: list[str]) -> None:
  whole = {f"jaxpipe.{name}": source.replace("J.", "jaxpipe.") for name, source in sources.items()}
  modules = {*whole, *(name.removesuffix(".__init__") for name in whole)}
  assert find_circle(whole, modules) == [f"jaxpipe.{name}" for name in circle]


@pytest.mark.parametrize(
  ("init", "modules", "faults"),
  [
    ('"""A room. Open `door.py` first, then `experiments/lm.py`."""', ["door", "wall"], 0),
    ('"""A room. Open the door first."""', ["door"], 1),
    ("", ["door"], 1),
    ('"""A room. Open `window.py` first, then `door.py`."""', ["door"], 1),
    ('"""Open `m0.py` first."""', [f"m{i}" for i in range(MOST_MODULES)], 0),
    ('"""Open `m0.py` first."""', [f"m{i}" for i in range(MOST_MODULES + 1)], 1),
  ],
)
def test_a_planted_fault_of_a_folder_is_found(init: str, modules: list[str], faults: int) -> None:
  assert len(faults_of_folder("jaxpipe.part.folder", init, modules)) == faults


def test_folders_and_version_are_attributes_of_the_package():
  """`import jaxpipe` alone did not find `jaxpipe.schedules`."""
  code = (
    "import jaxpipe, sys; assert 'jax' not in sys.modules; jaxpipe.schedules.from_csv;"
    " assert 'jax' not in sys.modules; jaxpipe.data, jaxpipe.parallel, jaxpipe.stack;"
    " jaxpipe.models, jaxpipe.training; print(jaxpipe.__version__)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
  assert (done.stdout.strip(), done.returncode) == (version, 0), done.stderr
