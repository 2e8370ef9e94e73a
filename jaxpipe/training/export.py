"""Exports the model of a language-model run in the files of Hugging Face's `transformers`.

    python -m jaxpipe.training.export RUN_DIR FOLDER

Writes config.json, model.safetensors (several files and an index beyond 4 GB) and, of a run with
byte-pair encoding, tokenizer.json. `experiments/lm.py --init_from=FOLDER` begins a run from such a
folder.
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
    Number of updates that the model has been trained for.

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
  """Runs the command: prints what it has written, or one line on standard error and exits 2.

  Args:
    arguments: the run directory and the folder to write.
  """
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
