"""Writes a section of docs/models.md: models that other people wrote, pipelined as they are.

    python docs/make/models.py              # all of them, and the page
    python docs/make/models.py bert qwen3   # some, printed

It wants packages that jaxpipe does not need, in an environment of their own beside jaxpipe:
`transformers` 4.49, the last minor version tried that has Flax models, `jax-resnet`, `jaxtyping`,
and `google-tunix`, which may be installed without its dependencies. Where one is missing, the
script says which and leaves the page alone. docs/make/models_glue.py has what a user writes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ.setdefault(
  "XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import flax
import jax
import models_given as given
import models_glue as glue
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from models_given import KEY, B, Original, Tree
from section import write_section

import jaxpipe
from jaxpipe.pipeline.check import leaf_errors

SCHEDULES, DEVICES, M = ("1f1b", "zb-h1"), (2, 4), 2
STEPS, RATE, DROPOUT = 20, 1e-2, 0.1  # of training
TOLERANCE = 1e-5
# Distribution -> the file of it that is wanted, from the folder of packages.
NEEDED = {
  "transformers": "transformers/models/bert/modeling_flax_bert.py",
  "jax-resnet": "jax_resnet/__init__.py",
  "google-tunix": "tunix/models/qwen3/model.py",
  "jaxtyping": "jaxtyping/__init__.py",
}


class Model(NamedTuple):
  """A row of the table.

  Attributes:
    package: the distribution that it comes from.
    title: its class.
    make: dropout rate -> the original.
    batch: what it is trained on.
    written: the glue: first a function of the model holding its variables, which returns modules in
      a row; then what it calls.
    why: what the glue is for.
    drops: whether it has dropout.
  """

  package: str
  title: str
  make: Callable[[float], Original]
  batch: Tree
  written: tuple[Any, ...]
  why: str
  drops: bool = True


MODELS = {
  "bert": Model(
    "transformers",
    "FlaxBertForSequenceClassification",
    given.make_bert,
    {**given.TEXT, **given.ONE, "mask": given.PADDED, "types": given.tokens((B, given.T), 2, 2)},
    (glue.bert, glue.BertLayer, glue.holding),
    "a layer returns a tuple, and wants a head mask, which is None",
  ),
  "gpt2": Model(
    "transformers",
    "FlaxGPT2LMHeadModel",
    given.make_gpt2,
    {**given.TEXT, **given.EVERY, "mask": given.PADDED},
    (glue.gpt2, glue.Gpt2Embed, glue.Gpt2Head, glue.First, glue.holding),
    "a block returns a tuple; embedding and head are no modules of their own",
  ),
  "vit": Model(
    "transformers",
    "FlaxViTForImageClassification",
    given.make_vit,
    {"x": given.pictures(8), **given.ONE},
    (glue.vit, glue.First, glue.holding),
    "a layer returns a tuple; the head reads the first token",
  ),
  "qwen3": Model(
    "google-tunix",
    "Qwen3",
    given.make_qwen3,
    {**given.TEXT, **given.EVERY, "mask": given.CAUSAL},
    (glue.qwen3, glue.Qwen3Layer),
    "a layer returns its cache too, and wants one, which is None",
    drops=False,
  ),
  "resnet": Model(
    "jax-resnet",
    "ResNet",
    given.make_resnet,
    {"x": given.pictures(16), **given.ONE},
    (glue.resnet,),
    "its variables are one dict, of which each layer takes its own",
    drops=False,
  ),
  "rnn": Model(
    "flax",
    "nnx.RNN",
    given.make_rnn,
    {**given.TEXT, **given.ONE},
    (glue.rnn,),
    "none but the list; the head reads the last state",
  ),
}


class Result(NamedTuple):
  """What a model gave under one schedule on one mesh.

  Attributes:
    same: whether it gave back the values that it was given, all of them, bit for bit.
    gradient: the largest error of a gradient leaf, by the measure of `jaxpipe.check`.
    predict: the largest difference of a prediction, over the largest value of all.
    losses: of every step of training.
  """

  same: bool
  gradient: float
  predict: float
  losses: list[float]

  @property
  def ok(self) -> bool:
    """Whether values are the same, errors within the tolerance, and the loss finite and falling."""
    close = self.gradient <= TOLERANCE and self.predict <= TOLERANCE
    falls = bool(np.isfinite(self.losses).all()) and self.losses[-1] < self.losses[0]
    return self.same and close and falls

  def __str__(self) -> str:
    """In one line, for the terminal."""
    losses = f"{self.losses[0]:.3f} to {self.losses[-1]:.3f}"
    return f"same {self.same}, gradient {self.gradient:.1e}, predict {self.predict:.1e}, {losses}"


def values(modules: list[Any]) -> list[Tree]:
  """Returns the variables of modules in a row: collection -> nested dict, for each that has any.

  Args:
    modules: as `jaxpipe.pipeline` takes them, or as `pipe.modules` gives them back.
  """
  found = []
  for module in modules:
    module = module.module if hasattr(module, "entries") else module  # of `jaxpipe.layer`
    module = getattr(module, "__self__", module)  # of a bound method
    if isinstance(module, nnx.Module):
      found.append({"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))})
    elif isinstance(module, nn.Module):
      found.append(module.variables)
    elif isinstance(module, Mapping):
      found.append(module)
  return found


def trained(collections: list[Tree]) -> list[Tree]:
  """Returns the parameters of what `values` returns."""
  return [one["params"] for one in collections if one.get("params")]


def true_gradient(original: Original, batch: Tree) -> Tree:
  """Returns the gradient of the original's mean loss: the mean over the microbatches."""
  rows = B // M
  each = [
    original.gradient(jax.tree.map(lambda leaf, m=m: leaf[m * rows : (m + 1) * rows], batch))
    for m in range(M)
  ]
  return jax.tree.map(lambda *leaves: sum(leaves) / M, *each)


def equal(a: Tree, b: Tree) -> bool:
  """Whether two trees have the same leaves, bit for bit."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def count(tree: Tree) -> int:
  """Returns the number of values in a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def train(step: Callable[..., Any], batch: Tree, params: Tree, *state: Tree) -> list[float]:
  """Trains by Adam; returns the loss of every step."""
  optimizer = optax.adam(RATE)
  moments = optimizer.init(params)

  @jax.jit
  def update(params: Tree, moments: Tree, grads: Tree) -> tuple[Tree, Tree]:
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments

  losses = []
  for n in range(STEPS):
    (value, _, *after), grads = step(params, batch, jax.random.key(n), *state)
    params, moments = update(params, moments, grads)
    state = tuple(after)
    losses.append(float(value))
  return losses


def measure(model: Model, schedule: str, devices: int) -> Result:
  """Pipelines a model in one way, and compares it with the original."""
  batch = model.batch

  def cut(original: Original, variables: Tree) -> list[Any]:
    return model.written[0](original.bound(variables))

  def begin(original: Original) -> tuple[Any, Tree, tuple[Tree, ...]]:
    pipe = jaxpipe.pipeline(
      given.loss,
      cut(original, original.variables),
      batch,
      mesh=f"stage:{devices}",
      schedule=schedule,
      microbatches=M,
    )
    state = (pipe.init_state(KEY, batch),) if pipe.stack.has_state else ()
    return pipe, pipe.init(KEY, batch), state

  original = model.make(0.0)
  pipe, params, state = begin(original)
  all_of_them = sum(count(pipe.unplace(tree)) for tree in (params, *state))
  same = all_of_them == count(original.variables) and equal(
    values(pipe.modules(params, *state)), values(cut(original, original.variables))
  )
  _, grads = pipe.value_and_grad(params, batch, KEY, *state)
  true = {**original.variables, "params": true_gradient(original, batch)}
  errors = leaf_errors(
    trained(values(pipe.modules(grads, *state))), trained(values(cut(original, true)))
  )
  if model.drops:
    original = model.make(DROPOUT)
    pipe, params, state = begin(original)
  y = original.call(original.variables, batch)
  difference = np.abs(pipe.predict(params, batch, *state) - y).max() / np.abs(y).max()
  losses = train(pipe.value_and_grad, batch, params, *state)
  return Result(same, max(errors.values()), float(difference), losses)


def lines(model: Model) -> int:
  """Returns how many lines of glue a model needed, without blank ones and those of docstrings."""
  sources = "\n".join(map(inspect.getsource, model.written)).splitlines()
  return sum(bool(line.strip()) and '"""' not in line for line in sources)


def row(model: Model, results: list[Result]) -> str:
  """Returns a model's row of the table.

  Args:
    model: it.
    results: of every schedule and number of devices.
  """
  cells = (
    f"`{model.title}`",
    f"{model.package} {importlib.metadata.version(model.package)}",
    f"{lines(model)}",
    model.why,
    f"{sum(one.ok for one in results)} of {len(results)}",
    f"{sum(one.same for one in results)} of {len(results)}",
    f"{max(one.gradient for one in results):.1e}",
    f"{max(one.predict for one in results):.1e}",
    f"{results[0].losses[0]:.2f} to {max(one.losses[-1] for one in results):.2f}"
    + (", dropout" if model.drops else ""),
  )
  return f"| {' | '.join(cells)} |"


def missing() -> list[str]:
  """Returns the distributions that lack what is wanted of them."""
  lacking = []
  for package, file in NEEDED.items():
    spec = importlib.util.find_spec(file.partition("/")[0])
    places = (spec.submodule_search_locations if spec else None) or []
    if not any((pathlib.Path(place).parent / file).exists() for place in places):
      lacking.append(f"{package} ({file})")
  return lacking


def section(rows: list[str], seconds: float) -> str:
  """Returns the section: the text around the table, and the glue."""
  table = "\n".join(rows)
  code = inspect.getsource(glue).partition("\n\n\n")[2].replace("  # noqa: E731", "").strip()
  return f"""Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}, \
CPU, float32, M={M}; {" and ".join(SCHEDULES)}, each with P={" and ".join(map(str, DEVICES))}; \
{seconds / 60:.0f} CPU minutes.

| model | package | lines of glue | what needed it | cases passed | values bit for bit |\
 largest gradient error | largest difference of predict | loss, {STEPS} steps |
|---|---|---|---|---|---|---|---|---|
{table}

The glue, all of it:

```python
{code}
```"""


def main() -> None:
  """Measures, and writes the section if that were all models."""
  if lacking := missing():
    print(f"nothing measured, for want of {', '.join(lacking)}: see the head of {__file__}")
    return
  names = sys.argv[1:] or list(MODELS)
  began, rows = time.process_time(), []
  for name in names:
    results = []
    for schedule in SCHEDULES:
      for devices in DEVICES:
        results.append(measure(MODELS[name], schedule, devices))
        print(name, schedule, devices, results[-1], flush=True)
    rows.append(row(MODELS[name], results))
    jax.clear_caches()  # programs of one model are of no use to another
  print("\n".join(rows))
  if names == list(MODELS):
    write_section("models.md", "models.py", section(rows, time.process_time() - began))


if __name__ == "__main__":
  main()
