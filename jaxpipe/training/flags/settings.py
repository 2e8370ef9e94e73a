"""A configuration as one frozen value whose fields are flags (see `flags.py`).

Each field's metadata hold the flag's help, and whether a run may be resumed with another value:
what decides the numbers (model, data, optimizer, seed) may not change, where and how they are
computed (mesh, schedule, ...) may, and so may the length of the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Self

from jaxpipe.training.flags.errors import ConfigError


def same(default: Any, help: str) -> Any:
  """A field that a resumed run must repeat."""
  return dataclasses.field(default=default, metadata={"help": help, "may_change": False})


def free(default: Any, help: str) -> Any:
  """A field that a resumed run may change."""
  return dataclasses.field(default=default, metadata={"help": help, "may_change": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What flags can say; a subclass adds fields by `same` and `free`."""

  def flag(self, name: str) -> str:
    """The field as one would type it: `--layers=4`."""
    return show_flag(name, getattr(self, name))

  def flags(self, *names: str) -> tuple[str, ...]:
    """Several fields as one would type them."""
    return tuple(self.flag(name) for name in names)

  def to_dict(self) -> dict[str, Any]:
    """The fields as JSON holds them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> Self:
    """Reads `to_dict` back; fields that this version does not know raise TypeError."""
    return cls(**fields)

  def _check(self, name: str, good: bool, message: str) -> None:
    if not good:
      raise ConfigError(f"{self.flag(name)} {message}")

  # Both are written so that a NaN is refused as well.

  def _check_counts(self, *names: str) -> None:
    for name in names:
      self._check(name, getattr(self, name) >= 1, "is not a count; use 1 or more")

  def _check_amounts(self, *names: str) -> None:
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
