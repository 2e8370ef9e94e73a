"""AmoebaNet-D, GPipe's convolutional network, on the handwritten digits that ship here.

    ./launch/local.sh experiments/image_amoebanet.py

About 0.1M parameters in 6 layers, no two alike, with batch norm, over 4 CPU devices: 200 steps of
128 images. Expected on two cores: about 4 minutes, one of them to compile; README has what was
seen. The same command resumes, on any number of stages and under any schedule; `--help` lists the
flags.
"""

import dataclasses
import pathlib

from jaxpipe.models.vision.amoebanet import amoebanet
from jaxpipe.models.vision.amoebanet_cells import AmoebaNetConfig
from jaxpipe.models.vision.pictures import CONVOLUTIONS
from jaxpipe.training.command.task import Task
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.errors import naming
from jaxpipe.training.flags.settings import free, same
from jaxpipe.training.tasks.digits import DigitsConfig, digits_task

DIGITS = pathlib.Path(__file__).resolve().parents[1] / "data" / "digits" / "digits.csv.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmoebaNetRun(DigitsConfig):
  """The flags: those of every run on digits, and the model's."""

  layers: int = same(3, "normal cells, a multiple of 3; two reduction cells stand between them")
  filters: int = same(16, "channels of the first cells; 4 times as many in the last")
  stem_cells: int = same(0, "reduction cells before the first normal one; 2 for large pictures")
  momentum: float = same(0.9, "of the running averages of batch norm")
  convolution: str = free("matmul", "matmul, quick on CPUs, or xla, for accelerators")

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_choice("convolution", CONVOLUTIONS)


def build(config: AmoebaNetRun) -> Task:
  with naming(*config.flags("layers", "filters", "stem_cells")):
    model = AmoebaNetConfig(
      layers=config.layers,
      filters=config.filters,
      classes=10,
      image_channels=1,
      stem_cells=config.stem_cells,
      momentum=config.momentum,
      convolution=CONVOLUTIONS[config.convolution],
    )
  return digits_task(config, amoebanet(model))


DEFAULTS = AmoebaNetRun(
  digits=str(DIGITS),
  run_dir="runs/amoebanet",
  batch_size=128,
  steps=200,
  warmup_steps=20,
  learning_rate=1e-2,
  weight_decay=0.01,
  partition="best",
  validate_every=50,
  checkpoint_every=100,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
