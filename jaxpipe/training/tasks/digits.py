"""The task of classifying the handwritten digits, for any stack that classifies images.

`experiments/mlp.py`, `vit.py` and `image_amoebanet.py` differ in their stacks alone.
"""

from __future__ import annotations

import dataclasses

from jaxpipe.data.experiments.digits import load_digits
from jaxpipe.data.experiments.examples import held_out
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.command.task import Baseline, Task, TaskConfig
from jaxpipe.training.flags.settings import free, same


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig(TaskConfig):
  """The flags of an experiment on digits; a subclass adds those of its model.

  Each field is a flag, and its help text says what it means.
  """

  digits: str = free("", "digits.csv.gz, as in data/digits")
  shift: int = same(1, "pixels by which training images are moved at most, each way")

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check("shift", 0 <= self.shift < 8, "moves digits out of sight; use 0 or 1")


def digits_task(config: DigitsConfig, stack: LayerStack) -> Task:
  """Returns the task of classifying the digits.

  Args:
    config: the flags.
    stack: the network. It takes batches of `image` float32 [B, 8, 8, 1], `label` int32 [B] and
      `weights` float32 [B], and its head's metrics hold `correct`, the weight of images that it
      classifies rightly.

  Raises:
    DataError: the file cannot be read.
  """
  data = load_digits(config.digits)
  return Task(
    stack=stack,
    batches=lambda step: data.batch(config.batch_size, config.seed, step, config.shift),
    validation=list(held_out(data.test, config.batch_size)),
    summarize=lambda loss, metrics, weight: {"accuracy": metrics["correct"] / weight},
    baseline=Baseline(
      name="always the most frequent digit", metrics={"accuracy": data.most_frequent}
    ),
    identity={"digits": data.checksum},
    data_line=f"data: {len(data.train['label']):,} digits to train on,"
    f" {len(data.test['label']):,} held out",
  )
