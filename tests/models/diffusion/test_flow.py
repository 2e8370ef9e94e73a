"""Euler steps along a field whose end is known: that of Gaussian data."""

import jax.numpy as jnp
import numpy as np

from jaxpipe.models.diffusion.flow import euler, guide
from jaxpipe.models.diffusion.gaussian_velocity import GaussianVelocity

rng = np.random.default_rng(0)


def test_the_gaussian_field_ends_at_its_gaussian():
  deviation = 0.5

  def field(x, t, labels):
    slope = (t * deviation**2 - (1 - t)) / ((1 - t) ** 2 + (t * deviation) ** 2)
    return 2.0 + slope[:, None] * (x - 2.0 * t[:, None])

  noise = jnp.asarray(rng.standard_normal((2000, 1)), jnp.float32)
  out = euler(field, noise, jnp.zeros(2000, int), 200)
  # The flow of a Gaussian to a Gaussian is affine: every point keeps its rank.
  np.testing.assert_allclose(out, 2.0 + deviation * noise, atol=0.02)


def test_no_affine_predictor_is_better():
  labels = np.arange(4000) % 2
  mixing = rng.standard_normal((2, 3, 3))
  data = np.einsum("nd,nde->ne", rng.standard_normal((4000, 3)), mixing[labels]) + labels[:, None]
  time, noise = 0.4, rng.standard_normal((4000, 3))
  at_time = (1 - time) * noise + time * data
  predicted = GaussianVelocity.fit(data, labels, shrink=0)(at_time, time, labels)
  for c in range(2):
    rows = labels == c
    design = np.c_[at_time[rows], np.ones(rows.sum())]
    target = (data - noise)[rows]
    best = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    got, least = ((predicted[rows] - target) ** 2).mean(), ((best - target) ** 2).mean()
    assert least <= got < 1.02 * least


def test_guidance_extrapolates_from_no_class():
  def field(x, t, labels):
    return x + labels[:, None]

  x, labels = jnp.zeros((2, 1)), jnp.asarray([1, 2])
  got = guide(field, 3.0, no_class=5)(x, jnp.zeros(2), labels)
  np.testing.assert_allclose(got[:, 0], [5 + 3 * (1 - 5), 5 + 3 * (2 - 5)])
  assert guide(field, 1.0, no_class=5) is field
