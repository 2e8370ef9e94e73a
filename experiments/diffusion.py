"""A diffusion transformer that draws digits: flow matching in the space of a frozen encoder.

    ./launch/local.sh experiments/diffusion.py

0.32M parameters over 4 CPU devices, 1,000 steps of 128 digits of 8x8 pixels, each as 16 latents of
3 channels (principal components of 2x2 pixels, which lose 7 % of the variance and are never
trained). Expected on two cores: about 2 minutes, and `runs/diffusion/samples.png`. README has the
mean squared error of the velocity on held-out digits, where the mean leaves 1.68, and how many of
500 samples, drawn by 50 Euler steps, are nearest to the mean of the digit that was asked for; of
real digits 88 % are. The same command resumes; `--help` lists the flags.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxpipe.data.experiments.digits import CLASSES, Digits, load_digits
from jaxpipe.data.experiments.flow_batches import FlowBatches
from jaxpipe.models.diffusion.dit import DitConfig, dit
from jaxpipe.models.diffusion.flow import euler, guide, velocity_field
from jaxpipe.models.diffusion.gaussian_velocity import GaussianVelocity
from jaxpipe.models.diffusion.patch_codec import PatchCodec
from jaxpipe.training.command.task import Baseline, Task, TaskConfig
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.settings import free, same

DIGITS = pathlib.Path(__file__).resolve().parents[1] / "data" / "digits" / "digits.csv.gz"
PASSES = 4  # of the held-out digits in one validation, each with other noise and times


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRun(TaskConfig):
  """The flags: those of every run, of the model, the noise and the samples."""

  layers: int = same(4, "blocks of the model")
  width: int = same(64, "width D of the model")
  heads: int = same(4, "heads of attention")
  patch: int = same(2, "pixels along a side of what becomes one latent")
  channels: int = same(3, "numbers of a latent")
  unlabelled: float = same(0.1, "share of digits whose class is withheld in training")
  guidance: float = free(1.5, "how far samples go away from what has no class; 1: not at all")
  samples: int = free(500, "digits to draw at the end")
  sampling_steps: int = free(50, "Euler steps from noise to digit")


def build(config: DiffusionRun) -> Task:
  """Builds the task: the codec, the network, and the best affine predictor to compare it with."""
  digits = load_digits(DIGITS)
  train, test = (part["image"][..., 0] for part in (digits.train, digits.test))
  codec = PatchCodec.fit(train, config.patch, config.channels)
  latent = codec.encode(train[:1]).shape[1:]
  model = DitConfig(
    classes=CLASSES,
    tokens=latent[0],
    layers=config.layers,
    width=config.width,
    heads=config.heads,
  )
  stack = dit(model, codec)
  batches = FlowBatches(
    images=train,
    labels=digits.train["label"],
    batch_size=config.batch_size,
    latent=latent,
    seed=config.seed,
    unlabelled=config.unlabelled,
    no_class=CLASSES,
  )
  # Drawn from the held-out digits in the same way, always the same ones.
  measured = dataclasses.replace(
    batches, images=test, labels=digits.test["label"], seed=2**32, unlabelled=0.0
  )
  held_out = [measured[k] for k in range(PASSES * len(test) // config.batch_size)]
  affine = GaussianVelocity.fit(codec.encode(train), digits.train["label"])
  best = affine.error(codec.encode(test), digits.test["label"])
  return Task(
    stack=stack,
    batches=batches.__getitem__,
    validation=held_out,
    weigh=lambda batch: float(batch["noise"].size),
    baseline=Baseline(
      name="the best affine predictor of each class and time", metrics={"loss": best}
    ),
    finish=functools.partial(draw, config, stack, codec, digits),
    identity={"digits": digits.checksum},
    data_line=f"data: {len(train):,} digits to train on, {len(test):,} held out, latents {latent}",
  )


def draw(
  config: DiffusionRun, stack: Any, codec: PatchCodec, digits: Digits, params: Any, state: Any
) -> str:
  """Draws samples of all digits, in turn, and counts those nearest to the digit they should be."""
  labels = np.arange(config.samples) % CLASSES
  latent = codec.encode(digits.test["image"][:1, ..., 0])
  noise = jax.random.normal(jax.random.key(config.seed), (config.samples, *latent.shape[1:]))

  @jax.jit
  def sample(params: Any, state: Any) -> jax.Array:
    field = guide(velocity_field(stack, params, state), config.guidance, CLASSES)
    return euler(field, noise, jnp.asarray(labels), config.sampling_steps)

  images = codec.decode(np.asarray(sample(params, state)))
  path = pathlib.Path(config.run_dir) / "samples.png"
  picture(images[: 10 * CLASSES], path)
  right = np.mean(nearest(digits, images) == labels)
  real = np.mean(nearest(digits, digits.test["image"][..., 0]) == digits.test["label"])
  return (
    f"{right:.1%} of {len(images)} samples are nearest to the mean of the digit asked for (of real"
    f" digits {real:.1%}, by chance {1 / CLASSES:.0%}): {path}"
  )


def nearest(digits: Digits, images: Any) -> Any:
  """Returns, for each image [n, 8, 8], the digit whose mean image is nearest, int [n]."""
  known, labels = digits.train["image"][..., 0], digits.train["label"]
  means = np.stack([known[labels == c].mean(axis=0) for c in range(CLASSES)])
  return ((images[:, None] - means) ** 2).sum(axis=(2, 3)).argmin(axis=1)


def picture(images: Any, path: pathlib.Path) -> None:
  """Writes the images as a grid, a column a digit."""
  figure = Figure(figsize=(5, 5))
  axes = figure.subplots(-(-len(images) // CLASSES), CLASSES, squeeze=False).ravel()
  for ax in axes:
    ax.axis("off")
  for ax, image in zip(axes, images, strict=False):
    ax.imshow(image, cmap="gray_r", vmin=0, vmax=1)
  figure.savefig(path, dpi=120)


DEFAULTS = DiffusionRun(
  run_dir="runs/diffusion",
  batch_size=128,
  steps=1000,
  learning_rate=2e-3,
  warmup_steps=50,
  weight_decay=0.01,
  validate_every=200,
  checkpoint_every=200,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
