"""Runs any experiment as a command: reads its flags, trains, and exits with a status.

    status     meaning
    0          done
    1          a bug, with its traceback
    2          the command or its input is wrong; one line on standard error says how
    128 + n    ended by signal n, after saving

All processes of a run exit with the same status; an error that all of them have is printed once, by
process 0.
"""

from __future__ import annotations

import functools
import logging as standard_logging
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import app, logging

from jaxpipe.training.command.cache import cache_folder, use_compilation_cache
from jaxpipe.training.command.dry_run import dry_run
from jaxpipe.training.flags.errors import ConfigError, naming
from jaxpipe.training.flags.flags import (
  define_flags,
  exit_with_error,
  parse_flags,
  read_ahead,
  read_flags,
)
from jaxpipe.training.loop.loop import train
from jaxpipe.training.plan.run import Run
from jaxpipe.training.processes.processes import (
  Processes,
  agreed,
  check_same,
  is_first,
  say,
  several,
  start,
  wait,
)

Result = TypeVar("Result")
# What a command does: a run, or a function that is called in place of one.
Job = Run | Callable[[], None]

# Flags that may differ between processes, since they are paths on the machine of each. What is in
# the text is compared all the same.
_MAY_DIFFER = frozenset({"text", "data_cache", "compilation_cache"})


def launch(
  defaults: Any,
  build: Callable[[Any], Job],
  finish: Callable[[Any], None] = lambda run: None,
  read: Callable[[], Any] | None = None,
) -> None:
  """Runs the process's command line, and exits.

  Args:
    defaults: a `RunConfig` with the values of flags that are not given.
    build: makes a run of the configuration, or a function to call in place of training. A
      ValueError that it raises is the user's mistake, and shown as one line.
    finish: called with the run, in process 0 alone, once it has all its steps.
    read: returns the configuration that the parsed flags describe; by default each field has the
      value of its flag.
  """
  define_flags(defaults)
  define_flags(Processes())
  try:
    read = read or functools.partial(read_flags, type(defaults))
    main = functools.partial(_main, lambda: build(read()), finish)
    app.run(main, flags_parser=_parse)
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
  """Joins the other processes, then parses all flags; a wrong one ends all processes alike."""
  # The flags that join processes come first: an error in any other flag is then known to all.
  _guard(lambda: start(read_ahead(Processes(), arguments)))
  return _guard(lambda: agreed(lambda: parse_flags(arguments)))


def _main(build: Callable[[], Job], finish: Callable[[Any], None], _: Sequence[str]) -> None:
  """Builds the job, does it, and exits; absl calls it with the arguments that are no flags."""
  # orbax reports every file it touches through absl's logger, matplotlib its font cache through
  # its own.
  logging.get_absl_logger().setLevel("ERROR")
  standard_logging.getLogger("matplotlib").setLevel("WARNING")
  job = _guard(lambda: _prepare(build))
  if not isinstance(job, Run):
    job()
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
    finish(job)
  wait("end")
  raise SystemExit(status)


def _prepare(build: Callable[[], Job]) -> Job:
  """Builds the job; all processes must mean the same run and share its folder."""
  job = agreed(lambda: _build(build))
  if not isinstance(job, Run) or job.config.dry_run:
    return job
  # `auto` weighs what each process's devices have.
  decided = {"chosen schedule": job.schedule.tokens()}
  check_same({**job.config.to_dict(), **job.record.data, **decided}, _MAY_DIFFER)
  agreed(lambda: job.begin() if is_first() else job)
  agreed(job.folder.check_shared)
  return job


def _build(build: Callable[[], Job]) -> Job:
  """Builds the job and, of a run, turns JAX's cache of compiled programs on."""
  job = build()
  if isinstance(job, Run):
    with naming(job.config.flag("compilation_cache")):
      use_compilation_cache(cache_folder(job.config.compilation_cache, "programs"))
  return job


def _guard(step: Callable[[], Result]) -> Result:
  """Shows what is wrong with the command or its input as one line; the one place that does.

  Only what comes before training goes through it: a ValueError in there is the user's, one in
  training is a bug and keeps its traceback.
  """
  try:
    return step()
  except (ValueError, OSError) as error:
    exit_with_error(error)
