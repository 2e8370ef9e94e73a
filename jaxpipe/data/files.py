"""Writes files that are there whole or not at all, since training jobs are killed at any moment."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """Opens a file that appears under its name only once it is complete and on disk.

  A killed process leaves at most a hidden `.tmp` file; the name keeps what it had. Several
  processes may write the same name at once: the last one wins, whole.

  Args:
    path: the final name; its folder is created.

  Yields:
    The file, open for writing bytes.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, because os.replace is atomic only within one file system.
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
  try:
    with os.fdopen(handle, "wb") as file:
      yield file
      file.flush()
      # Otherwise a power cut could keep the rename and lose the bytes.
      os.fsync(file.fileno())
    # mkstemp makes files that only their owner can read; caches are often shared.
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise
