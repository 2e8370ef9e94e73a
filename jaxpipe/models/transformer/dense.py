"""Matrices, biases and norms of a transformer, by its configuration.

Along `tensor` a matrix is cut along its outputs, and its bias with it; or along its inputs, and
then what comes out is a part of a sum: its bias is added once, to the whole sum (Megatron-LM,
arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.transformer.config import TransformerConfig


class Dense(nnx.Module):
  """A matrix [in, out], perhaps with a bias [out], whole or this device's piece.

  Cut along its outputs it is called; cut along its inputs, `shift` follows the sum of `multiply`.
  """

  def __init__(
    self,
    fan_in: int,
    out: int,
    *,
    bias: bool,
    dtype: Any,
    param_dtype: Any,
    scale: float,
    rngs: Any,
  ):
    self.dtype = dtype
    shape = (fan_in, out)
    self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), shape, param_dtype))
    self.bias = nnx.Param(jnp.zeros(out, param_dtype)) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., out]."""
    return self.shift(self.multiply(x))

  def multiply(self, x: jax.Array) -> jax.Array:
    """The product alone."""
    return jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))

  def shift(self, y: jax.Array) -> jax.Array:
    """Adds the bias, if there is one."""
    if self.bias is None:
      return y
    bias = self.bias[...].astype(self.dtype)
    return y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))


def make_dense(
  config: TransformerConfig, fan_in: int, out: int, rngs: nnx.Rngs, *, bias: bool, scale: float
) -> Dense:
  """A matrix whose weights have this standard deviation; biases begin at 0."""
  types: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype)
  return Dense(fan_in, out, bias=bias, scale=scale, rngs=rngs, **types)


def make_norm(
  config: TransformerConfig, rngs: nnx.Rngs, width: int = 0
) -> nnx.RMSNorm | nnx.LayerNorm:
  """The norm that the configuration names, over the model's width or another."""
  options: dict[str, Any] = dict(
    epsilon=config.norm_epsilon, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
  )
  if config.norm == "rmsnorm":
    return nnx.RMSNorm(width or config.width, **options)
  # The mean of squares less the square of the mean loses what the two have in common.
  return nnx.LayerNorm(width or config.width, use_fast_variance=False, **options)
