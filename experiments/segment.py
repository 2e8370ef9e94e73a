"""A U-Net that names every pixel of scenes made of handwritten digits.

    ./launch/local.sh experiments/segment.py

Scenes of 24x24 pixels with several digits each and noise, made anew for every step; those of the
test are made of digits that no training scene has. Skip connections cross the stages. About 0.12M
parameters in 5 layers over 4 CPU devices, 400 steps of 64 scenes. Expected on two cores: about 5
minutes; README has the share of pixels that were right and the mean IoU. The same command resumes,
on any number of stages and under any schedule; `--help` lists the flags.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jaxpipe.data.experiments.digits import load_digits
from jaxpipe.data.experiments.scenes import BACKGROUND, CLASSES, make_scenes
from jaxpipe.models.vision.pictures import CONVOLUTIONS
from jaxpipe.models.vision.segmentation import SegmentationConfig, mean_iou, segmentation
from jaxpipe.training.command.task import Baseline, Task, TaskConfig
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.settings import free, same

DIGITS = pathlib.Path(__file__).resolve().parents[1] / "data" / "digits" / "digits.csv.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentRun(TaskConfig):
  """The flags: those of every run, of the scenes and of the model."""

  digits: str = free(str(DIGITS), "digits.csv.gz, as in data/digits")
  size: int = same(24, "height and width of a scene, a multiple of 4")
  most: int = same(8, "digits that a scene has at most")
  noise: float = same(0.1, "standard deviation of what is added to every pixel; ink is 1")
  test_scenes: int = same(512, "scenes to test on")
  width: int = same(16, "channels at full size; twice and four times as many below")
  momentum: float = same(0.9, "of the running averages of batch norm")
  convolution: str = free("matmul", "matmul, quick on CPUs, or xla, for accelerators")

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_choice("convolution", CONVOLUTIONS)
    self._check_counts("most", "width", "test_scenes")
    self._check("size", self.size >= 8 and not self.size % 4, "is no multiple of 4; use 24 or 32")


def build(config: SegmentRun) -> Task:
  data = load_digits(config.digits)
  batches = -(-config.test_scenes // config.batch_size)
  held_out = [scenes(config, data.test, seed=0, number=i) for i in range(batches)]
  model = SegmentationConfig(
    classes=CLASSES,
    widths=(config.width, 2 * config.width, 4 * config.width),
    momentum=config.momentum,
    convolution=CONVOLUTIONS[config.convolution],
  )
  return Task(
    stack=segmentation(model),
    batches=lambda step: scenes(config, data.train, seed=config.seed, number=step),
    validation=held_out,
    weigh=lambda batch: float(batch["label"].size),
    summarize=summarize,
    baseline=baseline(held_out),
    identity={"digits": data.checksum},
    data_line=f"data: scenes of {len(data.train['label']):,} digits to train on; {batches}"
    f" batches of scenes of {len(data.test['label']):,} others held out",
  )


def scenes(config: SegmentRun, digits: Any, seed: int, number: int) -> dict[str, np.ndarray]:
  """Returns batch `number` of the series of scenes that a seed and some digits make."""
  return make_scenes(
    digits["image"][..., 0],
    digits["label"],
    seed=seed,
    number=number,
    rows=config.batch_size,
    size=config.size,
    most=config.most,
    noise=config.noise,
  )


def summarize(loss: float, metrics: Any, pixels: float) -> dict[str, float]:
  """Returns the share of pixels that are classified rightly, and the mean IoU of the classes."""
  return {
    "mean_iou": mean_iou(metrics["intersection"], metrics["union"]),
    "pixels": metrics["correct"] / pixels,
  }


def baseline(held_out: list[dict[str, np.ndarray]]) -> Baseline:
  """Returns the result of calling every pixel background.

  Its IoU is the background's share of the pixels for that class, and 0 for each digit that occurs.
  """
  label = np.concatenate([batch["label"] for batch in held_out])
  share = float(np.mean(label == BACKGROUND))
  metrics = {"mean_iou": share / len(np.unique(label)), "pixels": share}
  return Baseline(name="all background", metrics=metrics)


DEFAULTS = SegmentRun(
  run_dir="runs/segment",
  batch_size=64,
  steps=400,
  warmup_steps=40,
  learning_rate=1e-2,
  weight_decay=0.01,
  validate_every=100,
  checkpoint_every=100,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
