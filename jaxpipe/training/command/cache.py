"""Folders that runs share: prepared tokens, compiled programs."""

from __future__ import annotations

import os
import pathlib

import jax


def cache_folder(asked: str, name: str) -> pathlib.Path:
  """Returns the folder that a flag asks for, or one in the user's cache."""
  if asked:
    return pathlib.Path(asked)
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "jaxpipe" / name


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Keeps compiled programs in a folder, so that the same command starts faster next time."""
  # JAX only warns where it cannot write, step after step.
  os.makedirs(folder, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
