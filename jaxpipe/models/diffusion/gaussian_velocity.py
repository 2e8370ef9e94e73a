"""The best affine predictor of velocity at every time, as a baseline that a network has to beat.

Were the latents of a class Gaussian with mean m and covariance S, the velocity data - noise would
have, given x_t = (1 - t) noise + t data, the mean

    m + (t S - (1 - t) I) ((1 - t)^2 I + t^2 S)^-1 (x_t - t m)

and for any latents of that mean and covariance nothing affine in x_t is better. A network that
merely learns scale and correlations stops here.

Dims: L elements of a latent, flattened.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianVelocity:
  """Affine predictors, one for each class and time.

  Attributes:
    means: [classes, L], mean of the latents of each class.
    covariances: [classes, L, L], their covariance.
  """

  means: Floats
  covariances: Floats

  @classmethod
  def fit(cls, latents: Floats, labels: npt.NDArray[Any], shrink: float = 0.1) -> GaussianVelocity:
    """Estimates the mean and the covariance of every class.

    Args:
      latents: [n, ...], n latents of any shape.
      labels: int [n], each class at least once.
      shrink: weight of the covariance within all classes against that of the class itself, which
        comes from few rows.
    """
    flat, classes = latents.reshape(len(latents), -1), int(labels.max()) + 1
    means = np.stack([flat[labels == c].mean(axis=0) for c in range(classes)])
    within = np.cov(flat - means[labels], rowvar=False)
    own = np.stack([np.cov(flat[labels == c], rowvar=False) for c in range(classes)])
    return cls(means, (1 - shrink) * own + shrink * within)

  def __call__(self, latents_t: Floats, time: float, labels: npt.NDArray[Any]) -> Floats:
    """Predicts velocities.

    Args:
      latents_t: [B, ...], latents at time t.
      time: t in [0, 1], the same for all of them.
      labels: int [B], their classes.

    Returns:
      Velocities [B, ...].
    """
    flat, unit = latents_t.reshape(len(latents_t), -1), np.eye(self.means.shape[1])
    velocity = np.empty_like(flat)
    for c in np.unique(labels):
      rows, mean, covariance = labels == c, self.means[c], self.covariances[c]
      # Covariance of velocity and x_t, and of x_t with itself.
      cross = time * covariance - (1 - time) * unit
      own = (1 - time) ** 2 * unit + time**2 * covariance
      velocity[rows] = mean + (flat[rows] - time * mean) @ np.linalg.solve(own, cross)
    return velocity.reshape(latents_t.shape)

  def error(self, latents: Floats, labels: npt.NDArray[Any], times: int = 20) -> float:
    """Returns the mean squared error of the predictor, in expectation over time and noise.

    Args:
      latents: [B, ...].
      labels: int [B], their classes.
      times: number of times in [0, 1], evenly spaced, at each of which all latents are used. The
        noise is drawn from a fixed seed.
    """
    rng, errors = np.random.default_rng(0), []
    for time in (np.arange(times) + 0.5) / times:
      noise = rng.standard_normal(latents.shape)
      at_time = (1 - time) * noise + time * latents
      errors.append(np.mean((self(at_time, time, labels) - (latents - noise)) ** 2))
    return float(np.mean(errors))
