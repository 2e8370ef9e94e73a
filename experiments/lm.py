"""A language model on the text that ships with the repository.

    ./launch/local.sh experiments/lm.py

About 1M parameters over 4 CPU devices, 2,000 steps of 1,024 bytes. Expected on two cores: about 4
minutes, and at the end text that looks like a play; README has the validation loss that was seen.
The same command resumes; `--sample` only prints text; `--preset=gpt2` takes the shape of a known
model, `--init_from=FOLDER` its weights, too; `--help` lists the flags.
"""

import pathlib

from jaxpipe.training.lm.command import run_lm
from jaxpipe.training.lm.config import Config

TEXT = pathlib.Path(__file__).resolve().parents[1] / "data" / "shakespeare" / "plays.txt"

if __name__ == "__main__":
  run_lm(Config(text=str(TEXT)))
