"""What people outside this repository rely on, as a list: names, arguments, flags, file formats.

`contracts.txt`, beside this file, is that list as it was agreed on. Whoever changes it does so on
purpose, and writes it anew:

    PYTHONPATH=. .venv/bin/python tests/test_contracts.py > tests/contracts.txt

Words of help texts and messages are not in it. They may become better at any time.
"""

import ast
import dataclasses
import difflib
import enum
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxpipe
from jaxpipe.models.transformer import TransformerConfig, transformer
from jaxpipe.pipeline.pipelined import Pipelined
from jaxpipe.schedules.command.arguments import parser
from jaxpipe.training.flags.run_config import RunConfig
from jaxpipe.training.flags.settings import show_flag
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.load import LoadedRun
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.loop.metrics import Record
from jaxpipe.training.plan.optimizer import make_optimizer
from jaxpipe.training.plan.run_dir import RunDir, RunRecord
from jaxpipe.training.plan.state import TrainState
from jaxpipe.training.processes.processes import Processes

ROOT = pathlib.Path(__file__).parents[1]
AGREED = pathlib.Path(__file__).with_name("contracts.txt")

# Paths that people were told to import, besides the names of `jaxpipe`.
TOLD = (
  "jaxpipe.models.transformer.TransformerConfig",
  "jaxpipe.models.transformer.transformer",
  "jaxpipe.pipeline.pipelined.pipeline",
  "jaxpipe.pipeline.timeline.measure",
  "jaxpipe.training.export.main",
)
# What people use of these classes, by the README, the guide and the docstrings.
MEMBERS: dict[str, tuple[type, tuple[str, ...]]] = {
  "LayerStack": (jaxpipe.LayerStack, ("from_modules", "init", "init_state", "depth")),
  "MemoryReport": (jaxpipe.MemoryReport, ("total",)),
  "Schedule": (
    jaxpipe.Schedule,
    ("from_tokens", "tokens", "check", "devices", "chunks", "stages"),
  ),
  "Timeline": (jaxpipe.Timeline, ("makespan", "span", "bubble", "span_bubble")),
  "what jaxpipe.load returns": (LoadedRun, ("sample",)),
  "what jaxpipe.pipeline returns": (
    Pipelined,
    (
      "init",
      "init_state",
      "value_and_grad",
      "evaluate",
      "optimizer",
      "place",
      "unplace",
      "check",
      "predict",
    ),
  ),
}


def test_nothing_that_others_rely_on_has_changed() -> None:
  agreed, now = AGREED.read_text().splitlines(), contracts().splitlines()
  difference = "\n".join(difflib.unified_diff(agreed, now, "agreed", "now", lineterm="", n=2))
  assert not difference, f"{difference}\n\nIf this is meant, write {AGREED.name} anew."


def contracts() -> str:
  """The whole list, a section each."""
  sections = {
    "jaxpipe": [describe(name, getattr(jaxpipe, name)) for name in sorted(jaxpipe.__all__)],
    "jaxpipe.schedules": of_package("jaxpipe.schedules"),
    "jaxpipe.data": of_package("jaxpipe.data"),
    "paths to import": [describe(path, found(path)) for path in TOLD],
    **{f"members of {name}": members(*of) for name, of in MEMBERS.items()},
    "names of schedules": jaxpipe.schedules.schedule_names(),
    "python -m jaxpipe.schedules, with defaults": schedule_flags(),
    "keys of a schedule's JSON": schedule_keys(),
    "launchers": launcher_flags(),
    "flags of every experiment that trains": shared_flags(),
    **{f"experiments/{path.name}, besides those": flags_of(path) for path in experiments()},
    "metrics.jsonl": metrics_keys(),
    "a run directory": run_directory(),
    "a checkpoint": checkpoint(),
  }
  return "".join(
    f"[{title}]\n" + "".join(f"{line}\n" for line in lines) + "\n"
    for title, lines in sections.items()
  )


def describe(name: str, value: Any) -> str:
  """One line: the arguments of a function, the fields of a dataclass, the members of an enum."""
  if isinstance(value, types.GenericAlias):
    return f"{name}: a type"
  if isinstance(value, types.ModuleType):
    return f"{name}: a module{' that can be called' * callable(value)}"
  if isinstance(value, type):
    bases = [base.__name__ for base in value.__bases__ if base is not object]
    if issubclass(value, Exception):
      return f"{name}: an error, {', '.join(bases)}"
    if issubclass(value, enum.Enum):
      return f"{name}: {', '.join(f'{member.name}={member.value!r}' for member in value)}"
    if not dataclasses.is_dataclass(value):
      return f"{name}: a class, {', '.join(bases) or 'no dataclass'}"
  return f"{name}{signature(value)}" if callable(value) else f"{name}: a property"


def signature(call: Any) -> str:
  """Names, kinds and defaults of the arguments, without their types."""
  whole = inspect.signature(call)
  plain = [p.replace(annotation=inspect.Parameter.empty) for p in whole.parameters.values()]
  text = str(whole.replace(parameters=plain, return_annotation=inspect.Signature.empty))
  # Of a function or class the name, wherever it stands; of one that is private, or none, not even
  # that: no caller can write it.
  text = re.sub(r"<function (\S+) at 0x\w+>|<class '(?:\w+\.)*(\w+)'>", r"\1\2", text)
  return re.sub(r"=(_\w+|[\w.]*<lambda>)", "=...", text)


def found(path: str) -> Any:
  """What stands at a dotted path: a module, or something in one."""
  parts = path.split(".")
  for n in range(len(parts), 0, -1):
    try:
      value: Any = importlib.import_module(".".join(parts[:n]))
    except ModuleNotFoundError:
      continue
    for name in parts[n:]:
      value = getattr(value, name)
    return value
  raise ModuleNotFoundError(path)


def of_package(path: str) -> list[str]:
  package = importlib.import_module(path)
  return [describe(name, getattr(package, name)) for name in sorted(package.__all__)]


def members(kind: type, names: tuple[str, ...]) -> list[str]:
  return [describe(name, getattr(kind, name)) for name in names]


def schedule_flags() -> list[str]:
  return [f"{name}={default!r}" for name, default in vars(parser().parse_args([])).items()]


def schedule_keys() -> list[str]:
  """Of a plain schedule, of one with replicas, of paths of its own, and of a sharded head."""
  sizes = {"devices": 4, "microbatches": 4}
  kinds: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "chimera": {},
    "skippipe": {},
    "zb-h1": {"head": "sharded"},
  }
  lines = []
  for name, options in kinds.items():
    timeline = jaxpipe.simulate(jaxpipe.make_schedule(name, **sizes, **options))
    keys = json.loads(jaxpipe.schedules.to_json(timeline))
    lines.append(f"{name}: {', '.join(keys)}")
  return lines


def launcher_flags() -> list[str]:
  """Flags of each launcher, and the environment variables that they all read."""
  lines, variables = [], set()
  for path in sorted((ROOT / "launch").iterdir()):
    text = path.read_text()
    variables |= set(re.findall(r"JAXPIPE_\w+", text))
    own = re.findall(r"^ +(--\w+)(?:=\*)?\) ", text, re.MULTILINE)
    own += re.findall(r"== (--\w+) \]\]", text)
    if own:
      lines.append(f"{path.name}: {' '.join(own)}")
  return [*lines, f"environment: {' '.join(sorted(variables))}"]


def experiments() -> list[pathlib.Path]:
  return sorted((ROOT / "experiments").glob("*.py"))


def shared_flags() -> list[str]:
  return config_flags(RunConfig(run_dir="FOLDER")) + config_flags(Processes())


def flags_of(path: pathlib.Path) -> list[str]:
  """Flags of a script that are its own or have another default."""
  text = path.read_text()
  if path.name == "lm.py":
    defaults: Any = Config()
  elif "DEFAULTS = " in text:
    spec = importlib.util.spec_from_file_location(f"contracts_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names of annotations
    spec.loader.exec_module(module)
    defaults = module.DEFAULTS
  else:
    return list(absl_flags(text)) or ["no flags"]
  shared = shared_flags()
  return [line for line in config_flags(defaults) if line not in shared]


def config_flags(defaults: Any) -> list[str]:
  """A flag for each field; (same) where a resumed run must repeat it."""
  lines = []
  for field in dataclasses.fields(defaults):
    flag = show_flag(field.name, getattr(defaults, field.name)).replace(str(ROOT), "ROOT")
    same = field.metadata.get("may_change", True) is False
    lines.append(flag + " (same)" * same)
  return sorted(lines)


def absl_flags(text: str) -> Iterator[str]:
  """Flags that a source defines itself: not imported, since two scripts may share a name."""
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_"):
      name, *values = node.args
      # The last is the help text.
      yield f"--{ast.literal_eval(name)}={', '.join(map(ast.unparse, values[:-1]))}"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "define_flags":
      yield f"and those of {', '.join(map(ast.unparse, node.args))}"


def metrics_keys() -> list[str]:
  numbers = dict(step=0, loss=1.0, grad_norm=1.0, learning_rate=1.0, step_seconds=1.0)
  of_text = Record(**numbers, tokens_per_second=1.0, validation_loss=1.0)
  other = Record(**numbers, tokens_per_second=None, more={"validation_accuracy": 1.0})
  return [f"text: {', '.join(of_text.to_dict())}", f"other: {', '.join(other.to_dict())}"]


def run_directory() -> list[str]:
  """Its files, by the names that the code gives them, and the keys of its record."""
  with tempfile.TemporaryDirectory() as folder:
    run = RunDir(pathlib.Path(folder))
    run.begin(RunRecord(config=Config(), data={"tokens": "0"}))
    record = json.loads((run.path / "config.json").read_text())
    files = sorted(path.name for path in run.path.iterdir())
    named = (run.checkpoints, run.metrics, run.loss_png, run.profile)
    return [
      f"begun: {', '.join(files)}",
      f"later: {', '.join(path.name for path in named)}",
      f"config.json: {', '.join(record)}; format {record['format']!r}",
      f"data: {', '.join(record['data'])}",
    ]


def checkpoint() -> list[str]:
  """The items of one, and the names and shapes of the canonical parameters in it."""
  shape = dict(vocabulary_size=8, layers=2, width=4, heads=2, kv_heads=1, mlp_width=6)
  stack, optimizer = transformer(TransformerConfig(**shape)), make_optimizer(Config())
  params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), stack.param_shapes())
  state = TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(1))
  schedule = jaxpipe.make_schedule("gpipe", devices=1, microbatches=1)
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(pathlib.Path(folder))
    mesh, meta = jaxpipe.make_mesh("stage:1"), {"seed": 0, "config": {}, "data": {}}
    checkpoints.save(state, stack, schedule, mesh, meta)
    checkpoints.wait()
    meta = checkpoints.meta(1)
    checkpoints.close()
    items = sorted(path.name for path in (pathlib.Path(folder) / "1").iterdir() if path.is_dir())
  leaves = jax.tree.leaves_with_path(params)
  return [
    f"items: {', '.join(items)}",
    f"meta: {', '.join(sorted(meta))}",
    *(f"params{jax.tree_util.keystr(path)} {list(leaf.shape)}" for path, leaf in leaves),
  ]


if __name__ == "__main__":
  print(contracts(), end="")
