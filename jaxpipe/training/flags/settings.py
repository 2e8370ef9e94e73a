"""The base class of configurations: frozen dataclasses whose fields are flags (see `flags.py`).

    class MyRun(Settings):
      width: int = same(64, "width of the model")        # --width, which a resumed run repeats
      mesh: str = free("stage:4", "devices by axis")     # --mesh, which may change on resuming

Each field's metadata hold the flag's help, and whether a run may be resumed with another value:
what decides the numbers (model, data, optimizer, seed) may not change, where and how they are
computed (mesh, schedule, ...) may, and so may the length of the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, Self

from jaxpipe.training.flags.errors import ConfigError


def same(default: Any, help: str) -> Any:
  """Declares a field whose value a resumed run must repeat.

  Args:
    default: its type is the flag's: bool, int, float or str.
    help: the flag's help text.
  """
  return dataclasses.field(default=default, metadata={"help": help, "may_change": False})


def free(default: Any, help: str) -> Any:
  """Declares a field whose value may differ when a run is resumed.

  Args:
    default: its type is the flag's: bool, int, float or str.
    help: the flag's help text.
  """
  return dataclasses.field(default=default, metadata={"help": help, "may_change": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """A configuration without fields; a subclass adds them by `same` and `free`."""

  @classmethod
  def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values of flags that were not given, by name, as those that were given imply them.

    Args:
      given: the flags that were given, by name.
    """
    return {}

  def flag(self, name: str) -> str:
    """The field as one would type it: `--layers=4`."""
    return show_flag(name, getattr(self, name))

  def flags(self, *names: str) -> tuple[str, ...]:
    """Several fields as one would type them: `("--layers=4", "--width=64")`."""
    return tuple(self.flag(name) for name in names)

  def to_dict(self) -> dict[str, Any]:
    """The fields by their names, as `config.json` of a run directory holds them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> Self:
    """Reads `to_dict` back; fields that this version does not know raise TypeError."""
    return cls(**fields)

  def _check(self, name: str, good: bool, message: str) -> None:
    """Raises a ConfigError that begins with the flag unless its value is good."""
    if not good:
      raise ConfigError(f"{self.flag(name)} {message}")

  def _check_choice(self, name: str, choices: Collection[str]) -> None:
    """Refuses a value that is none of some words."""
    known = getattr(self, name) in choices
    self._check(name, known, f"is unknown; use {', '.join(choices)}")

  # Both comparisons below are written so that a NaN is refused as well.

  def _check_counts(self, *names: str) -> None:
    """Refuses values below 1."""
    for name in names:
      self._check(name, getattr(self, name) >= 1, "is not a count; use 1 or more")

  def _check_amounts(self, *names: str) -> None:
    """Refuses values that are negative or infinite."""
    for name in names:
      value = getattr(self, name)
      self._check(name, value >= 0, "is negative or no number; use 0 or more")
      self._check(name, math.isfinite(value), "is not finite; use a number")


def show_flag(name: str, value: Any) -> str:
  """A flag as one would type it, on one line."""
  if isinstance(value, bool):
    return f"--{'' if value else 'no'}{name}"
  # A prompt may hold a line break, and an error is one line.
  text = str(value)
  return f"--{name}={text if text.isprintable() else json.dumps(text)}"
