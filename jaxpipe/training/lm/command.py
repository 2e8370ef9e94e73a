"""The command line of the language-model experiment: it trains and then samples, or only samples.

`run_lm` is for language models what `run_task` of `training/command/task_run.py` is for all other
experiments; both leave flags, processes and exit statuses to `training/command/launch.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxpipe.training.command.launch import launch
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.load import LoadedRun, load
from jaxpipe.training.lm.model_flags import read_config
from jaxpipe.training.lm.run import LmRun, build_run
from jaxpipe.training.processes.processes import several


def run_lm(defaults: Config) -> None:
  """Runs the process's command line, and exits: trains, or resumes, and prints a sample of text.

  Args:
    defaults: values of the flags that are not given.
  """
  launch(defaults, _build, _finish, read_config)


def _build(config: Config) -> LmRun | Callable[[], None]:
  """Builds the run, or, with `--sample`, what is done in its place."""
  if not config.sample:
    return build_run(config)
  if several():
    raise ConfigError("--sample is for one process; leave --coordinator and --distributed out")
  return functools.partial(_print_sample, load(config.run_dir), config)


def _finish(run: LmRun) -> None:
  """Samples from the last checkpoint of a run that has all its steps."""
  _print_sample(load(run.config.run_dir), run.config)


def _print_sample(run: LoadedRun, config: Config) -> None:
  if not config.sample_length:
    return
  text = run.sample(config.prompt, config.sample_length, config.temperature, config.seed)
  print(f"--- sample after {run.step} steps ---\n{text}", flush=True)
