"""Makes a run of a `Task`: checks it, trains it by the loop of all runs, and prints the result.

`run_task` is what the scripts in `experiments/` call. Its counterpart for language models is
`training/lm/command.py`, and that of `TaskRun` is `LmRun` in `training/lm/run.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxpipe.parallel.mesh import row_shards
from jaxpipe.pipeline.partitioned import partitioned
from jaxpipe.training.command.launch import launch
from jaxpipe.training.command.task import Batch, Task, TaskConfig
from jaxpipe.training.flags.errors import ConfigError, naming
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.loop.metrics import read_records
from jaxpipe.training.loop.validation import sum_over
from jaxpipe.training.plan.plan import (
  build_mesh,
  build_schedule,
  check_batch,
  make_plan,
  schedule_flags,
)
from jaxpipe.training.plan.rows import ProcessRows
from jaxpipe.training.plan.run import Run, Validate
from jaxpipe.training.plan.run_dir import RunDir, check_config, check_data
from jaxpipe.training.plan.state import TrainState

Tree = Any
Kind = TypeVar("Kind", bound=TaskConfig)


def run_task(defaults: Kind, build: Callable[[Kind], Task]) -> None:
  """Runs the process's command line, and exits: trains, or resumes, and prints the result.

  Args:
    defaults: values of the flags that are not given; its fields are the flags.
    build: makes the task of a configuration. A ValueError that it raises is shown as one line, with
      exit status 2.
  """
  launch(defaults, lambda config: build_run(config, build), conclude)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TaskRun(Run):
  """A run of a task.

  Attributes:
    config: the flags.
    task: what the script's `build` has made of them.
  """

  config: TaskConfig
  task: Task

  @contextlib.contextmanager
  def batches(self, start: int) -> Iterator[Iterator[Batch]]:
    """Yields an iterator over batches from `start` on; each is made while a step is under way."""
    yield (self._own(self.task.batches(step)) for step in itertools.count(start))

  def validator(self) -> Validate:
    """Returns `validate(state)`: the mean loss over the held-out batches, and `summarize`'s."""
    return self._validate

  def _validate(self, state: TrainState) -> Mapping[str, float]:
    carried = (state.model_state,) if state.model_state else ()

    def weighed() -> Iterator[tuple[Any, float]]:
      for batch in self.task.validation:
        yield self.rows.put(self._own(batch)), self.task.weigh(batch)

    params = state.validation_params
    totals = sum_over(lambda batch: self.evaluate(params, batch, *carried), weighed())
    loss, weight = float(totals.loss / totals.weight), float(totals.weight)
    return {"loss": loss, **self.task.summarize(loss, totals.metrics, weight)}

  def _own(self, batch: Batch) -> Batch:
    """Returns the rows of this process, of a batch whose shapes are those of the first."""
    if _shapes(batch) != self.batch_shapes:
      raise ConfigError(
        f"a batch is {_show(batch)} where the first was {_show(self.batch_shapes)}; give all"
        " batches the same shapes, and fill the last one up with rows of weight 0"
      )
    return jax.tree.map(lambda leaf: leaf[self.rows.rows], batch)


def build_run(config: Kind, build: Callable[[Kind], Task]) -> TaskRun:
  """Checks a configuration against the machine, the task and the run directory.

  Args:
    config: the flags of the command.
    build: makes the task of them.

  Returns:
    A run that can begin. Nothing has been compiled, and nothing written.

  Raises:
    ValueError: anything that does not fit; one line with the flag, and the remedy.
  """
  mesh = build_mesh(config)
  schedule = build_schedule(config, mesh)
  check_batch(config, mesh)
  folder = RunDir(pathlib.Path(config.run_dir))
  record = folder.read(type(config))
  if record:
    check_config(folder.path, record, config)
  with naming(config.flag("mesh")):
    rows = ProcessRows(mesh, config.batch_size, config.microbatches)
  task = build(config)
  if record:
    check_data(folder.path, record, task.identity, lambda name: "data")
  shapes = _check_rows(config, task.batches(0))
  sizes = ["mesh", *schedule_flags(config)]
  stack = task.stack
  if config.partition:
    with naming(*config.flags("partition", *sizes)):
      stack, _ = partitioned(
        stack,
        schedule,
        shapes,
        config.partition,
        shards=row_shards(mesh),
        residuals=config.residuals,
      )
  plan = make_plan(config, mesh, schedule, stack, shapes, filled_by=sizes)
  return TaskRun(
    **vars(plan),
    config=config,
    folder=folder,
    rows=rows,
    identity=task.identity,
    data_line=task.data_line,
    task=task,
  )


def conclude(run: TaskRun) -> None:
  """Prints the result of a finished run beside its baseline, and what the task adds to it."""
  validated = [r for r in read_records(run.folder.metrics) if r["validation_loss"] is not None]
  if validated:
    print(_result(run.task, validated[-1]), flush=True)
  if run.task.finish:
    print(run.task.finish(*_restore(run)), flush=True)


def _result(task: Task, record: Mapping[str, Any]) -> str:
  """Formats the figures of the last validation, and the baseline's beside them."""
  start = "validation_"
  found = {name.removeprefix(start): x for name, x in record.items() if name.startswith(start)}
  parts = [f"{name} {value:.4f}" for name, value in found.items()]
  if task.baseline:
    others = ", ".join(f"{name} {value:.4f}" for name, value in task.baseline.metrics.items())
    parts.append(f"({task.baseline.name}: {others})")
  return f"result after {record['step'] + 1} steps: {'  '.join(parts)}"


def _restore(run: TaskRun) -> tuple[Tree, Tree]:
  """Reads canonical parameters and model state from the newest checkpoint to one device."""
  here = SingleDeviceSharding(jax.local_devices()[0])
  checkpoints = Checkpoints(run.folder.checkpoints, read_only=True, alone=True)
  step = checkpoints.newest
  assert step is not None  # a finished run has saved its last step
  stack, average = run.stack, run.config.ema > 0
  params = checkpoints.restore_params(step, stack.param_shapes(), here, average=average)
  shapes = stack.state_shapes() if stack.has_state else {}
  state = checkpoints.restore_model_state(step, shapes, here)
  checkpoints.close()
  return params, state


def _check_rows(config: TaskConfig, batch: Batch) -> Tree:
  """Returns the shapes of a batch.

  Raises:
    ConfigError: a leaf without B rows, or of a dtype that JAX would change, such as float64.
  """
  for path, leaf in jax.tree.leaves_with_path(batch):
    name = f"batch{jax.tree_util.keystr(path)}"
    if np.ndim(leaf) < 1 or len(leaf) != config.batch_size:
      raise ConfigError(
        f"{config.flag('batch_size')}: {name} is {list(np.shape(leaf))}; every leaf is [B, ...]"
        f" with B = {config.batch_size}"
      )
    taken = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if taken != leaf.dtype:
      raise ConfigError(f"{name} is {leaf.dtype}, and JAX computes in {taken}; make it {taken}")
  return _shapes(batch)


def _shapes(batch: Batch) -> Tree:
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)


def _show(batch: Batch) -> str:
  return ", ".join(
    f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree.leaves_with_path(batch)
  )
