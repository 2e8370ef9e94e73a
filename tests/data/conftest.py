"""Token bins for the data tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.data import TokenBin, open_bin, write_bin


@pytest.fixture
def counting_bin(tmp_path: Path) -> Callable[[int], TokenBin]:
  """`counting_bin(n)`: a bin of the tokens 0 to n - 1, so that each tells its own position."""

  def make(count: int) -> TokenBin:
    path = tmp_path / f"{count}.bin"
    if not path.exists():
      write_bin(path, np.arange(count), vocabulary_size=70_000, fingerprint="ab" * 32)
    return open_bin(path)

  return make
