"""Tiny runs for the training tests."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpipe.training.lm.config import Config

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n"

# One layer a stage on four stages; small enough that a step takes milliseconds.
TINY: dict[str, Any] = {
  "layers": 4,
  "width": 16,
  "heads": 2,
  "kv_heads": 1,
  "mlp_width": 32,
  "batch_size": 4,
  "sequence_length": 16,
  "warmup_steps": 4,
  "learning_rate": 1e-2,
  "sample_length": 0,
  "unroll": "none",  # the quickest to compile
}


MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
  """`make_config(folder, steps=5)`: a configuration whose files are all under `folder`."""

  def make(folder: Path, **changes: Any) -> Config:
    text = folder / "text.txt"
    if not text.exists():
      text.write_text(TEXT * 40)
    folders = {"run_dir": str(folder / "run"), "data_cache": str(folder / "cache")}
    return Config(**{**TINY, "text": str(text), **folders, **changes})

  return make


@pytest.fixture
def tiny(tmp_path: Path, make_config: MakeConfig) -> MakeConfig:
  """`tiny(steps=5)`: the same under `tmp_path`, where `text.txt` stands ready."""
  make_config(tmp_path)
  return functools.partial(make_config, tmp_path)


@pytest.fixture
def text(tmp_path: Path, tiny: MakeConfig) -> Path:
  """The text that `tiny` trains on."""
  return tmp_path / "text.txt"
