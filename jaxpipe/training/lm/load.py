"""Loads the model of a language-model run from its run directory, to sample from it or export it.

The directory alone suffices: neither the mesh that trained the model nor the text is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxpipe.data import Tokenizer
from jaxpipe.models.transformer.adapters import merge
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.sample import Sampler
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.plan.run_dir import RunDir

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoadedRun:
  """A trained language model, as the newest checkpoint of its run holds it.

  Attributes:
    config: the flags of the run.
    stack: the model, without adapters. Its experts, if it has any, drop no token, whatever capacity
      the run had.
    params: canonical parameters, whole on one device, or their moving average where the run kept
      one; those that were frozen are among them, and adapters are merged into their matrices.
    tokenizer: turns text into the model's ids and back.
    step: number of updates that the parameters have been trained for.
  """

  config: Config
  stack: LayerStack
  params: Tree
  tokenizer: Tokenizer
  step: int

  def sample(
    self, prompt: str = "\n", length: int = 400, temperature: float = 0.8, seed: int = 0
  ) -> str:
    """Returns a text: the prompt and what the model says next.

    Args:
      prompt: how the text begins.
      length: tokens to draw.
      temperature: of sampling; 0 takes the likeliest token.
      seed: the same seed gives the same text.
    """
    return self._sampler(prompt, length, temperature, seed)

  @functools.cached_property
  def _sampler(self) -> Sampler:
    return Sampler(
      stack=self.stack,
      params=self.params,
      tokenizer=self.tokenizer,
      window=self.config.sequence_length,
    )


def load(run_dir: str | os.PathLike[str]) -> LoadedRun:
  """Loads the newest checkpoint of a run.

  Args:
    run_dir: the `--run_dir` of `experiments/lm.py`; it is only read.

  Returns:
    The run, its parameters on this process's first device.

  Raises:
    ConfigError: no run there, or one without a checkpoint yet.
  """
  folder = RunDir(pathlib.Path(run_dir))
  record = folder.read(Config)
  if record is None:
    raise ConfigError(f"--run_dir={run_dir}: no run there; train one first, or check the path")
  step = None
  if folder.checkpoints.is_dir():
    checkpoints = Checkpoints(folder.checkpoints, read_only=True, alone=True)
    step = checkpoints.newest
  if step is None:
    raise ConfigError(f"--run_dir={run_dir}: no checkpoint yet; let the run reach its first one")
  # Sizes the vocabulary; the configuration alone does not, where a file did.
  tokenizer = folder.tokenizer()
  model = record.config.model(tokenizer.vocabulary_size)
  if model.moe:
    # With a capacity, positions that are not drawn yet would take slots from those that are.
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, capacity_factor=0))
  stack = transformer(model, record.config.freeze)
  device = SingleDeviceSharding(jax.local_devices()[0])
  average = record.config.ema > 0
  params = checkpoints.restore_params(step, stack.param_shapes(), device, average=average)
  shapes = stack.state_shapes() if stack.has_state else {}
  state = checkpoints.restore_model_state(step, shapes, device)
  checkpoints.close()
  return LoadedRun(
    config=record.config,
    stack=transformer(dataclasses.replace(model, lora=None)),
    params=merge(stack, model.lora, params, state),
    tokenizer=tokenizer,
    step=step,
  )
