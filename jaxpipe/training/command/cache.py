"""Cache folders that all runs of a user share: prepared tokens, compiled programs."""

from __future__ import annotations

import os
import pathlib

import jax


def cache_folder(asked: str, name: str) -> pathlib.Path:
  """Returns the folder that a flag asks for, or one in the user's cache.

  Args:
    asked: the flag's value; empty: `$XDG_CACHE_HOME/jaxpipe`, or `~/.cache/jaxpipe`.
    name: of the folder in there, such as `data`.
  """
  if asked:
    return pathlib.Path(asked)
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "jaxpipe" / name


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Makes JAX keep compiled programs in a folder, so that a command starts faster next time."""
  # JAX only warns where it cannot write, step after step.
  os.makedirs(folder, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
