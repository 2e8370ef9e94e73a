"""The convolutional networks over the pipeline give the gradients and averages of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.models.amoebanet import Classifier, amoebanet
from jaxpipe.models.amoebanet_cells import AmoebaNetConfig
from jaxpipe.models.pictures import convolve
from jaxpipe.models.segmentation import SegmentationConfig, segmentation
from jaxpipe.models.stack import LayerStack

OPTIONS = dict(convolution=convolve, dtype=jnp.float64, param_dtype=jnp.float64, momentum=0.9)

# Schedule, P, layers of each stage, of which each network has three.
CASES = [
  ("gpipe", 2, None),
  ("1f1b", 4, (1, 0, 1, 1)),
  ("zb-h1", 2, (1, 2)),
  ("zb-v", 2, (0, 1, 1, 1)),
  ("chimera", 4, None),
]


def pictures(rows, size, classes, of_pixels):
  rng = np.random.default_rng(0)
  label = rng.integers(0, classes, (rows, size, size) if of_pixels else rows)
  weights = np.ones(rows)
  weights[-1] = 0
  return {"image": rng.normal(size=(rows, size, size, 1)), "label": label, "weights": weights}


def check(stack, name, devices, partition, batch):
  stack = dataclasses.replace(stack, partition=partition)
  schedule = jaxpipe.make_schedule(name, devices=devices, microbatches=4)
  mesh = jaxpipe.make_mesh(f"stage:{devices}", devices=jax.devices()[:devices])
  report = jaxpipe.check(stack, schedule, mesh, batch)
  assert report.ok and report.state_errors, f"\n{report}"


@pytest.mark.sampled("name, devices, partition", CASES, 1)
def test_amoebanet_is_exact(name, devices, partition, float64):
  """The first three layers: the stem, a normal cell, a reduction cell."""
  config = AmoebaNetConfig(
    layers=3, filters=4, classes=3, image_channels=1, stem_cells=0, **OPTIONS
  )
  whole = amoebanet(config)
  head = lambda rngs: Classifier(config, 3 * 8, rngs)  # noqa: E731
  stack = LayerStack(embed=whole.embed, layers=whole.layers[:3], head=head)
  check(stack, name, devices, partition, pictures(8, 4, 3, False))


@pytest.mark.sampled("name, devices, partition", CASES, 1)
def test_skips_over_stages_are_exact(name, devices, partition, float64):
  config = SegmentationConfig(classes=3, widths=(2, 3), **OPTIONS)
  check(segmentation(config), name, devices, partition, pictures(8, 4, 3, True))
