"""The model of a run as `transformers` and its kin read it.

    python -m jaxpipe.training.export RUN_DIR FOLDER

Writes config.json, model.safetensors (several files and an index beyond 4 GB) and, of a BPE run,
tokenizer.json. `experiments/lm.py --init_from=FOLDER` reads it, too.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from jaxpipe.data import BpeTokenizer
from jaxpipe.models import huggingface
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.flags.flags import exit_with_error
from jaxpipe.training.lm.load import load


def export_run(run_dir: str, folder: str) -> int:
  """Writes the newest checkpoint of a run.

  Args:
    run_dir: the `--run_dir` of `experiments/lm.py`; it is only read.
    folder: made if missing; must be empty.

  Returns:
    Updates that the model has seen.

  Raises:
    ValueError: no run there, a model that Hugging Face has no name for, or a folder in use.
  """
  run = load(run_dir)
  model = run.config.model(run.tokenizer.vocabulary_size)
  huggingface.export(folder, run.params, model, length=run.config.sequence_length)
  if isinstance(run.tokenizer, BpeTokenizer):
    (pathlib.Path(folder) / "tokenizer.json").write_text(run.tokenizer.to_json())
  return run.step


def main(arguments: Sequence[str]) -> None:
  """Runs the command; exits 2 with one line where it cannot."""
  logging.get_absl_logger().setLevel("ERROR")  # orbax reports every file that it touches
  try:
    if len(arguments) != 2:
      raise ConfigError("usage: python -m jaxpipe.training.export RUN_DIR FOLDER")
    step = export_run(*arguments)
  except (ValueError, OSError) as error:
    exit_with_error(error)
  print(f"{arguments[1]}: the model of {arguments[0]} after {step} steps")


if __name__ == "__main__":
  main(sys.argv[1:])
