"""Imports go one way: parts that must not know each other do not, and JAX's private parts stay so.

Sources are parsed, never imported, so that imports inside functions and under `TYPE_CHECKING`
count as well.
"""

import ast
import pathlib
from collections.abc import Iterator

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

# Part -> what it must do without; "" stands for all of jaxpipe.
MAY_NOT_IMPORT = {
  "": {"experiments", "launch", "tests", "torch", "tensorflow"},
  "schedules": {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"},
  "data": {"jax", "jaxlib", "flax", "optax", "orbax"},
}


def imports(source: str, module: str, modules: set[str]) -> Iterator[str]:
  """Yields the modules that a source imports; `modules` are ours, apart from their values."""
  folder = module if f"{module}.__init__" in modules else module.rpartition(".")[0]
  for node in ast.walk(ast.parse(source)):
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


def violations(source: str, module: str, modules: set[str]) -> list[str]:
  """Returns one line per import of `module` that the tables above do not allow."""
  folder = module if f"{module}.__init__" in modules else module.rpartition(".")[0]
  part = folder.removeprefix("jaxpipe").removeprefix(".").split(".")[0]
  found = [f"{module} takes the private {name}" for name in private_jax(source)]
  if part and part not in MAY_IMPORT:
    found.append(f"{module} is in a part that MAY_IMPORT does not place")
  forbidden = MAY_NOT_IMPORT[""] | MAY_NOT_IMPORT.get(part, set())
  # What lies in the top folder itself (the public names) may know every part.
  allowed = {f"jaxpipe.{part}.", *MAY_IMPORT.get(part, ())} if part else {"jaxpipe."}
  below = tuple(name for name in allowed if name.endswith("."))
  for name in imports(source, module, modules):
    top = name.split(".")[0]
    ours = name in allowed or f"{name}.".startswith(below)
    if top in forbidden or (top == "jaxpipe" and not ours):
      found.append(f"{module} imports {name}")
  return found


def read_modules() -> dict[str, str]:
  """Returns the source of every module of jaxpipe by its dotted name."""
  sources = {}
  for path in sorted((ROOT / "jaxpipe").rglob("*.py")):
    sources[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text()
  return sources


SOURCES = read_modules()
# A package goes by its own name, and by its __init__, which tells it from a plain module.
MODULES = {*SOURCES, *(name.removesuffix(".__init__") for name in SOURCES)}


@pytest.mark.smoke
@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module: str) -> None:
  assert violations(SOURCES[module], module.removesuffix(".__init__"), MODULES) == []


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
    ("jaxpipe.training.loop.loop", "from jaxpipe.schedules import gpipe\nimport optax"),
  ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
  assert violations(source, module, TREE) == []
