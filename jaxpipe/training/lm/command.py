"""The command of a language-model experiment: it trains, then samples; or only samples."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxpipe.training.command.launch import launch
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.load import LoadedRun, load
from jaxpipe.training.lm.model_flags import read_config
from jaxpipe.training.lm.run import LmRun, build
from jaxpipe.training.processes.processes import several


def run_command(defaults: Config) -> None:
  """Runs the process's command line, and exits.

  Args:
    defaults: what the flags say unless they are given.
  """
  finish = lambda run: _print_sample(load(run.config.run_dir), run.config)  # noqa: E731
  launch(defaults, _build, finish, read_config)


def _build(config: Config) -> LmRun | Callable[[], None]:
  if not config.sample:
    return build(config)
  if several():
    raise ConfigError("--sample is for one process; leave --coordinator and --distributed out")
  return functools.partial(_print_sample, load(config.run_dir), config)


def _print_sample(run: LoadedRun, config: Config) -> None:
  if not config.sample_length:
    return
  text = run.sample(config.prompt, config.sample_length, config.temperature, config.seed)
  print(f"--- sample after {run.step} steps ---\n{text}", flush=True)
