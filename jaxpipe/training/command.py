"""The command of an experiment: flags in, exit status out.

0  done       2  the command or its input is wrong, one line says how
128 + n  ended by signal n after saving       1  a bug, with its traceback

The processes of a run all exit alike; what they all have to say, process 0 says.
"""

from __future__ import annotations

import logging as standard_logging
import os
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from absl import app, logging

from jaxpipe.training.config import Config
from jaxpipe.training.dry_run import dry_run
from jaxpipe.training.errors import ConfigError, naming
from jaxpipe.training.flags import (
  define_flags,
  exit_with_error,
  parse_flags,
  read_ahead,
  read_config,
)
from jaxpipe.training.load import LoadedRun, load
from jaxpipe.training.loop import train
from jaxpipe.training.processes import (
  Processes,
  agreed,
  check_same,
  is_first,
  say,
  several,
  start,
  wait,
)
from jaxpipe.training.setup import Setup, build, cache_folder

Result = TypeVar("Result")

# Paths on the machine of each process; of the text, what is in it is compared.
_MAY_DIFFER = frozenset({"text", "data_cache", "compilation_cache"})


def run_command(defaults: Config) -> None:
  """Runs the process's command line, and exits.

  Args:
    defaults: what the flags say unless they are given.
  """
  define_flags(defaults)
  define_flags(Processes())
  try:
    app.run(_main, flags_parser=_parse)
  except KeyboardInterrupt:
    # Before the first step there is nothing to save.
    _leave(130)
    raise SystemExit(130) from None
  except Exception:
    if several():
      traceback.print_exc()
      _leave(1)
    raise


def _leave(status: int) -> None:
  """Exits at once where others would be waited for: they wait for this process, in a collective."""
  if several():
    os._exit(status)


def _parse(arguments: Sequence[str]) -> list[str]:
  # Ahead of the others: whatever is wrong with those, all processes are then there to hear it.
  _guard(lambda: start(read_ahead(Processes(), arguments)))
  return _guard(lambda: agreed(lambda: parse_flags(arguments)))


def _main(_: Sequence[str]) -> None:
  # orbax reports every file it touches through absl's logger, matplotlib its font cache through
  # its own.
  logging.get_absl_logger().setLevel("ERROR")
  standard_logging.getLogger("matplotlib").setLevel("WARNING")
  job = _guard(_prepare)
  if isinstance(job, LoadedRun):
    _print_sample(job, _guard(read_config))
    return
  if job.config.dry_run:
    say(dry_run(job))
    wait("end")
    return
  try:
    status = train(job)
  # A damaged file in the run directory shows when it is read; any other error is a bug.
  except ConfigError as error:
    try:
      exit_with_error(error)
    finally:
      _leave(2)
  if not status and is_first():
    _print_sample(load(job.config.run_dir), job.config)
  wait("end")
  raise SystemExit(status)


def _prepare() -> Setup | LoadedRun:
  job = agreed(_build)
  if isinstance(job, LoadedRun):
    return job
  if job.config.dry_run:
    return job
  # `auto` weighs what each process's devices have.
  decided = {"chosen schedule": job.schedule.tokens()}
  check_same({**job.config.to_dict(), **job.record.data, **decided}, _MAY_DIFFER)
  agreed(lambda: job.begin() if is_first() else job)
  agreed(job.folder.check_shared)
  return job


def _build() -> Setup | LoadedRun:
  config = read_config()
  if config.sample:
    if several():
      raise ConfigError("--sample is for one process; leave --coordinator and --distributed out")
    return load(config.run_dir)
  setup = build(config)
  with naming(config.flag("compilation_cache")):
    use_compilation_cache(cache_folder(config.compilation_cache, "programs"))
  return setup


def _guard(step: Callable[[], Result]) -> Result:
  """Shows what is wrong with the command or its input as one line; the one place that does.

  Only what comes before training goes through it: a ValueError in there is the user's, one in
  training is a bug and keeps its traceback.
  """
  try:
    return step()
  except (ValueError, OSError) as error:
    exit_with_error(error)


def _print_sample(run: LoadedRun, config: Config) -> None:
  if not config.sample_length:
    return
  text = run.sample(config.prompt, config.sample_length, config.temperature, config.seed)
  print(f"--- sample after {run.step} steps ---\n{text}", flush=True)


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Keeps compiled programs in a folder, so that the same command starts faster next time."""
  # JAX only warns where it cannot write, step after step.
  os.makedirs(folder, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
