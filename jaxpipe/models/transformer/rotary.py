"""Rotary positions: queries and keys turned by angles that grow with their position.

The elements of a head are taken as H/2 pairs, (h, h + H/2), and each pair is turned by its own
frequency times the position. The product of a turned query and a turned key then depends on how far
apart they are, not on where they are.

References:
  RoFormer: Su et al., arXiv 2104.09864.
  The Llama 3 herd of models, arXiv 2407.21783: longer contexts by slower turns. What is slowed by
  how much is written in the configuration of its checkpoints only (`rope_type: llama3`).

Dims: B rows, T positions, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Llama 3's slower turns, for contexts longer than those of the first training.

  A frequency that turns more than `high` times within `length` positions stays, one that turns less
  than `low` times is divided by `factor`, and between them both are mixed.

  Attributes:
    factor: number that the slowest frequencies are divided by, 1 or more.
    low: turns within `length` positions below which a frequency is divided.
    high: turns within `length` positions above which a frequency stays.
    length: positions of the rows of the first training.

  Raises:
    ValueError: numbers that leave nothing to mix.
  """

  factor: float
  low: float
  high: float
  length: int

  def __post_init__(self) -> None:
    if not (self.factor >= 1 and 0 < self.low < self.high and self.length >= 1):
      raise ValueError(
        f"rope scaling {self}: factor {self.factor:g} is to be 1 or more, low {self.low:g} above 0"
        f" and below high {self.high:g}, length {self.length} 1 or more"
      )

  @classmethod
  def parse(cls, text: str) -> RopeScaling:
    """Reads `FACTOR,LOW,HIGH,LENGTH`, as in 32,1,4,8192.

    Raises:
      ValueError: not four numbers, or numbers that leave nothing to mix.
    """
    try:
      factor, low, high, length = text.split(",")
      return cls(factor=float(factor), low=float(low), high=float(high), length=int(length))
    except ValueError as error:
      if text.count(",") == 3 and "rope scaling" in str(error):
        raise
      raise ValueError(
        f"{text!r} is not FACTOR,LOW,HIGH,LENGTH; use one like 32,1,4,8192"
      ) from None

  def __str__(self) -> str:
    return f"{self.factor:g},{self.low:g},{self.high:g},{self.length}"

  def __call__(self, frequency_h: jax.Array) -> jax.Array:
    """Slows frequencies, float [H / 2] in radians a position; returns as many."""
    turns_h = frequency_h * (self.length / (2 * math.pi))
    kept_h = jnp.clip((turns_h - self.low) / (self.high - self.low), 0, 1)
    return frequency_h * (kept_h + (1 - kept_h) / self.factor)


def rotate(
  x_BTNH: jax.Array, base: float, at_T: jax.Array, scaling: RopeScaling | None = None
) -> jax.Array:
  """Turns the pair (h, h + H/2) of every head by the angle t * base^(-2h/H).

  Args:
    x_BTNH: queries or keys; H is even.
    base: base of the frequencies.
    at_T: int [T], the positions t.
    scaling: slows the frequencies first; None leaves them.

  Returns:
    [B, T, N, H] in the dtype of `x_BTNH`; angles are computed in float32 at least.
  """
  H = x_BTNH.shape[3]
  # In bfloat16, positions above 256 would be rounded.
  wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
  frequency = base ** (-jnp.arange(0, H, 2, dtype=wide) / H)
  if scaling:
    frequency = scaling(frequency)
  angle_T1h = (at_T.astype(wide)[:, None] * frequency[None, :])[None, :, None, :]
  sin, cos = jnp.sin(angle_T1h).astype(x_BTNH.dtype), jnp.cos(angle_T1h).astype(x_BTNH.dtype)
  a, b = jnp.split(x_BTNH, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
