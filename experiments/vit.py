"""A small Vision Transformer on the handwritten digits that ship with the repository.

    ./launch/local.sh experiments/vit.py

About 0.27M parameters over 4 CPU devices, 800 steps of 64 images. Expected on two cores: about 2
minutes; README has what was seen. The same command resumes, on any mesh and under any schedule;
`--help` lists the flags.
"""

import dataclasses
import pathlib

from jaxpipe.models.vision.vit import VitConfig, vit
from jaxpipe.training.command.task import Task
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.errors import naming
from jaxpipe.training.flags.settings import same
from jaxpipe.training.tasks.digits import DigitsConfig, digits_task

DIGITS = pathlib.Path(__file__).resolve().parents[1] / "data" / "digits" / "digits.csv.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitRun(DigitsConfig):
  """The flags: those of every run on digits, and the model's."""

  layers: int = same(8, "blocks of the model")
  width: int = same(64, "width D of the model")
  heads: int = same(4, "heads of attention, a divisor of --width")
  mlp_width: int = same(128, "hidden width of the MLP")
  patch: int = same(2, "pixels along a side of a patch")
  dropout: float = same(0.0, "rate after attention and after the MLP")


def build(config: VitRun) -> Task:
  with naming(*config.flags("width", "heads", "patch")):
    model = VitConfig(
      layers=config.layers,
      width=config.width,
      heads=config.heads,
      mlp_width=config.mlp_width,
      patch=config.patch,
      dropout=config.dropout,
    )
  return digits_task(config, vit(model))


DEFAULTS = VitRun(
  digits=str(DIGITS),
  run_dir="runs/vit",
  batch_size=64,
  steps=800,
  warmup_steps=80,
  learning_rate=3e-3,
  validate_every=200,
  checkpoint_every=200,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
