"""gMLP, a network without attention, on the handwritten digits that ship with the repository.

    ./launch/local.sh experiments/mlp.py

About 0.11M parameters over 4 CPU devices, 600 steps of 64 images. Expected on two cores: about 1
minute; README has what was seen. The same command resumes, on any mesh and under any schedule;
`--help` lists the flags.
"""

import dataclasses
import pathlib

from jaxpipe.models.vision.gmlp import GmlpConfig, gmlp
from jaxpipe.training.command.task import Task
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.errors import naming
from jaxpipe.training.flags.settings import same
from jaxpipe.training.tasks.digits import DigitsConfig, digits_task

DIGITS = pathlib.Path(__file__).resolve().parents[1] / "data" / "digits" / "digits.csv.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpRun(DigitsConfig):
  """The flags: those of every run on digits, and the model's."""

  layers: int = same(8, "blocks of the model")
  width: int = same(64, "width D of the model")
  hidden: int = same(128, "hidden channels of a block, half of which gate the others")
  patch: int = same(2, "pixels along a side of a patch")
  dropout: float = same(0.0, "rate after each block")


def build(config: MlpRun) -> Task:
  with naming(*config.flags("hidden", "patch")):
    model = GmlpConfig(
      layers=config.layers,
      width=config.width,
      hidden=config.hidden,
      patch=config.patch,
      dropout=config.dropout,
    )
  return digits_task(config, gmlp(model))


DEFAULTS = MlpRun(
  digits=str(DIGITS),
  run_dir="runs/mlp",
  batch_size=64,
  steps=600,
  warmup_steps=60,
  learning_rate=3e-3,
  validate_every=200,
  checkpoint_every=200,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
