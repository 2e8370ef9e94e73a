"""Batch norm for deep networks: the numbers of Flax's, traced in a tenth of the time.

`nnx.BatchNorm` writes its running averages into a slice, for which it asks a tracer for its
sharding. The answer is an error, into whose text JAX puts all that was traced before: a network of
hundreds of norms takes minutes to trace. This one replaces the averages as a whole.

Reference: Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167.

Dims: C channels, the last dim of x; all other dims are normalised over.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class BatchNorm(nnx.BatchNorm):
  """`nnx.BatchNorm` whose running averages have its parameters' dtype and are float32 at least."""

  def __init__(self, num_features: int, *, rngs: nnx.Rngs, **options: Any) -> None:
    """Makes the norm.

    Args:
      num_features: C.
      rngs: as Flax takes it.
      options: those of `nnx.BatchNorm`.
    """
    super().__init__(num_features, rngs=rngs, **options)
    wide = jnp.promote_types(self.param_dtype, jnp.float32)
    self.mean, self.var = (nnx.BatchStat(stat[...].astype(wide)) for stat in (self.mean, self.var))

  def __call__(
    self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
  ) -> jax.Array:
    """Normalises x, and in training moves the running averages.

    Args:
      x: [..., C].
      use_running_average: whether to normalise by the running averages; None: as the module's own
        attribute says, which `train` and `eval` set.
      mask: as for `nnx.BatchNorm`.

    Returns:
      An array of x's shape, in the module's dtype.
    """
    evaluates = self.use_running_average if use_running_average is None else use_running_average
    usual = self.axis == -1 and self.use_fast_variance and self.axis_index_groups is None
    if evaluates or mask is not None or not usual:
      # Flax's own code: evaluation writes no averages, and below are the usual options alone.
      return super().__call__(x, use_running_average, mask=mask)
    before = self.mean[...], self.var[...]
    wide = x.astype(jnp.promote_types(x.dtype, before[0].dtype))
    dims = tuple(range(x.ndim - 1))
    moments = jnp.mean(wide, dims), jnp.mean(jnp.square(wide), dims)
    if self.axis_name is not None:
      moments = lax.pmean(moments, self.axis_name)
    # The mean of squares less the square of the mean, as Flax computes it; rounding may leave it
    # below zero.
    mean, var = moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
    for stat, old, new in zip((self.mean, self.var), before, (mean, var), strict=True):
      stat.set_value(lax.stop_gradient(self.momentum * old + (1 - self.momentum) * new))

    def along(a: jax.Array) -> jax.Array:
      """[C] -> [1, ..., 1, C], of x's rank."""
      return a.reshape(*(1 for _ in dims), -1)

    y = (wide - along(mean)) * along(lax.rsqrt(var + self.epsilon))
    for each, apply in ((self.scale, jnp.multiply), (self.bias, jnp.add)):
      if each is not None:
        y = apply(y, along(each[...]))
    return y.astype(self.dtype or jnp.promote_types(wide.dtype, self.param_dtype))
