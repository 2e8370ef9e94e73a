"""Makes absl flags of a configuration's fields, and a configuration of the parsed flags.

absl itself exits with status 1 and prints its help when a flag is wrong. Scripts that start runs
want status 2 and one line that they can show, so that errors of absl become `ConfigError`s here.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from absl import flags

from jaxpipe.training.flags.errors import AgreedError, ConfigError
from jaxpipe.training.flags.settings import Settings

Ahead = TypeVar("Ahead")
Kind = TypeVar("Kind", bound=Settings)

_DEFINE: dict[type, Callable[..., Any]] = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}


def define_flags(defaults: Any, values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines one flag for every field of a dataclass.

  Args:
    defaults: a dataclass such as `Config`; its values are the flags' defaults, `metadata["help"]`
      of each field is the help text.
    values: absl's registry.
  """
  for field in dataclasses.fields(defaults):
    default = getattr(defaults, field.name)
    define = _DEFINE[type(default)]
    define(field.name, default, field.metadata["help"], flag_values=values)
    # Else --help, which shows the main program's flags, would show none.
    values.register_key_flag_for_module(sys.argv[0], values[field.name])


def parse_flags(arguments: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Reads a command line into the registry; for `app.run(flags_parser=...)`.

  Args:
    arguments: the program's name and what follows it.
    values: absl's registry.

  Returns:
    The program's name.

  Raises:
    ConfigError: an unknown flag, a value of the wrong type, or a word that is no flag.
  """
  try:
    # absl guesses what an unknown flag was meant to be only where the text comes from itself.
    rest = list(values(list(arguments)))
  except SystemExit:
    # absl's own --help, printed; it exits 1, which here means a bug.
    raise SystemExit(0) from None
  except flags.UnrecognizedFlagError as error:
    near = difflib.get_close_matches(error.flagname, list(values), n=1)
    remedy = f"did you mean --{near[0]}?" if near else "--help lists the flags"
    raise ConfigError(f"--{error.flagname}: unknown flag; {remedy}") from None
  except flags.Error as error:
    raise ConfigError(" ".join(str(error).split())) from None
  if len(rest) > 1:
    raise ConfigError(f"{rest[1]!r} is not a flag; write --NAME=VALUE, --help lists the flags")
  return rest


def read_ahead(defaults: Ahead, arguments: Sequence[str]) -> Ahead:
  """Reads the flags of one dataclass alone, whatever else stands on the command line.

  Args:
    defaults: values of flags that are not given.
    arguments: the program's name and what follows it.

  Returns:
    A dataclass of the kind of `defaults`. absl's own registry is left as it was.

  Raises:
    ConfigError: a value of the wrong type, or one that the dataclass refuses.
  """
  values = flags.FlagValues()
  define_flags(defaults, values)
  try:
    values(list(arguments), known_only=True)
  except flags.Error as error:
    raise ConfigError(" ".join(str(error).split())) from None
  return type(defaults)(**{name: values[name].value for name in vars(defaults)})


def read_flags(kind: type[Kind], values: flags.FlagValues = flags.FLAGS) -> Kind:
  """Returns the dataclass that the parsed flags describe.

  Args:
    kind: a dataclass, for whose fields `define_flags` has defined flags.
    values: absl's registry, parsed.

  Raises:
    ConfigError: a value that the dataclass refuses.
  """
  names = [field.name for field in dataclasses.fields(kind)]
  given = {name: values[name].value for name in names if values[name].present}
  implied = {k: v for k, v in kind.implied(given).items() if k not in given}
  return kind(**{name: values[name].value for name in names} | implied)


def exit_with_error(error: Exception) -> NoReturn:
  """Prints one line to standard error, once for all processes, and exits with status 2."""
  # Of an error that all processes raise, process 0 speaks for the others.
  if not (isinstance(error, AgreedError) and error.process):
    program = pathlib.Path(sys.argv[0]).name
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
  raise SystemExit(2) from None
