"""Reads the flags of a language model, two of which stand for many others.

`--preset=gpt2` and `--init_from=FOLDER` name a whole model: flags of its shape that are not given
take that model's values.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from jaxpipe.models.huggingface import read_config as read_model
from jaxpipe.models.transformer.presets import find_preset
from jaxpipe.training.flags.errors import ConfigError, naming
from jaxpipe.training.flags.flags import read_flags
from jaxpipe.training.lm.config import Config, shape_flags


def read_config(
  values: flags.FlagValues = flags.FLAGS, otherwise: Mapping[str, Any] | None = None
) -> Config:
  """Returns the configuration that the parsed flags describe.

  Args:
    values: absl's registry. Flags that were not given take the values of `--preset` or
      `--init_from`.
    otherwise: values by name, for flags that were not given; they win over the named model's.

  Raises:
    ConfigError: see `Config`; or a model that is unknown or cannot be read.
  """
  for name, value in {**_model_flags(values), **(otherwise or {})}.items():
    if not values[name].present:
      values[name].value = value
  return read_flags(Config, values)


def _model_flags(values: flags.FlagValues) -> dict[str, Any]:
  """Returns the values, by flag, of the model that `--preset` or `--init_from` names."""
  preset, folder = values["preset"].value, values["init_from"].value
  if preset and folder:
    raise ConfigError(
      f"--preset={preset} --init_from={folder}: both say what the model's shape is; leave --preset"
      " out"
    )
  if preset:
    with naming(f"--preset={preset}"):
      return shape_flags(find_preset(preset))
  if not folder:
    return {}
  with naming(f"--init_from={folder}"):
    shape = shape_flags(read_model(folder))
  tokenizer = pathlib.Path(folder) / "tokenizer.json"
  if not values["tokenizer"].present and not tokenizer.is_file():
    raise ConfigError(f"--init_from={folder}: has no tokenizer.json; give the model's --tokenizer")
  return {**shape, "tokenizer": str(tokenizer)}
