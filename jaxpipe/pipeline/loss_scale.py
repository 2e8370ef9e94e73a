"""A dynamic loss scale: as large as gradients in float16 allow, found while training.

Small gradients become zero in float16, large ones infinite. A step that is given a scale multiplies
the gradients that it computes by it, and divides the sums by it again in float32:

    (loss, metrics), grads = pipe.value_and_grad(params, batch, key, loss_scale=scale.value)
    finite = all_finite(grads)                          # else leave this update out
    scale = scale.adjust(finite)

References:
  Micikevicius et al., Mixed Precision Training, arXiv:1710.03740.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

_LARGEST = 2.0**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale:
  """A loss scale, and for how long gradients have been finite under it.

  It halves at every step whose gradients are not finite, and doubles after so many finite ones; it
  stays between 1 and 2^24.

  Attributes:
    value: float32 [], a power of two.
    finite: int32 [], finite steps since it last changed.
    interval: finite steps after which it doubles.
  """

  value: jax.Array
  finite: jax.Array
  interval: int = dataclasses.field(default=2000, metadata={"static": True})

  @classmethod
  def start(cls, value: float = 2.0**15, *, interval: int = 2000) -> LossScale:
    """The scale before the first step.

    Args:
      value: a power of two from 1 to 2^24.
      interval: finite steps after which it doubles.

    Raises:
      ValueError: a value that is no such power of two, or an interval below 1.
    """
    if not 1 <= value <= _LARGEST or math.frexp(value)[0] != 0.5:
      raise ValueError(
        f"a loss scale of {value} is no power of two from 1 to {_LARGEST:,.0f}; use one, such as"
        " 32768"
      )
    if interval < 1:
      raise ValueError(f"a loss scale cannot double after {interval} steps; use 1 or more")
    return cls(value=jnp.float32(value), finite=jnp.int32(0), interval=interval)

  def adjust(self, finite: jax.Array) -> LossScale:
    """The scale for the next step.

    Args:
      finite: bool [], whether all gradients of this step are finite.
    """
    count = jnp.where(finite, self.finite + 1, 0)
    grows = count >= self.interval
    grown = jnp.minimum(2 * self.value, _LARGEST)
    kept = jnp.where(grows, grown, self.value)
    value = jnp.where(finite, kept, jnp.maximum(self.value / 2, 1))
    return dataclasses.replace(self, value=value, finite=jnp.where(grows, 0, count))


def all_finite(grads: Tree) -> jax.Array:
  """Whether no element of a tree of gradients is infinite or NaN, bool []."""
  each = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)]
  return jnp.stack(each).all() if each else jnp.array(True)
