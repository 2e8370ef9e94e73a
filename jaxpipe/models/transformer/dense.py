"""Matrices (with adapters, if there are any), biases and norms of a transformer.

Along `tensor` a matrix is cut along its outputs, and its bias with it; or along its inputs, and
then what comes out is a part of a sum: its bias is added once, to the whole sum (Megatron-LM,
Shoeybi et al., arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.transformer.adapters import Lora
from jaxpipe.models.transformer.config import TransformerConfig


class Dense(nnx.Module):
  """A matrix [in, out], perhaps with a bias [out] and an adapter, whole or this device's piece.

  A matrix that is cut along its outputs is called. For one that is cut along its inputs, call
  `multiply`, add up over `tensor`, and call `shift` on the sum.
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
    lora: Lora | None = None,
  ):
    """Makes a matrix of normal values, and a bias of zeros.

    Args:
      fan_in: elements of the input.
      out: elements of the output.
      bias: whether there is a bias.
      dtype: of the arithmetic.
      param_dtype: of the parameters.
      scale: standard deviation of the matrix's values.
      rngs: gives one key of its stream `params`.
      lora: the adapter beside the matrix; None: there is none.
    """
    self.dtype, self.lora = dtype, lora
    shape, key = (fan_in, out), rngs.params()
    self.kernel = nnx.Param(scale * jax.random.normal(key, shape, param_dtype))
    self.bias = nnx.Param(jnp.zeros(out, param_dtype)) if bias else None
    if lora:
      # Of the matrix's key, so that what is made after it is the same as without adapters.
      key, shape = jax.random.fold_in(key, 1), (fan_in, lora.rank)
      self.lora_a = nnx.LoRAParam(fan_in**-0.5 * jax.random.normal(key, shape, param_dtype))
      self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, out), param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the product with the bias added: [..., in] -> [..., out]."""
    return self.shift(self.multiply(x))

  def multiply(self, x: jax.Array) -> jax.Array:
    """Returns the product without the bias: [..., in] -> [..., out]."""
    x = x.astype(self.dtype)
    y = jnp.matmul(x, self.kernel[...].astype(self.dtype))
    if self.lora is None:
      return y
    # Of a matrix that is cut along its inputs, so is A: this is a part of the sum as y is.
    low = jnp.matmul(x, self.lora_a[...].astype(self.dtype))
    return y + self.lora.scale * jnp.matmul(low, self.lora_b[...].astype(self.dtype))

  def shift(self, y: jax.Array) -> jax.Array:
    """Adds the bias, if there is one, to y [..., out]."""
    if self.bias is None:
      return y
    bias = self.bias[...].astype(self.dtype)
    return y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))


def make_dense(
  config: TransformerConfig, fan_in: int, out: int, rngs: nnx.Rngs, *, bias: bool, scale: float
) -> Dense:
  """Returns a matrix in the configuration's dtypes.

  Args:
    config: of the model.
    fan_in, out, rngs, bias, scale: see `Dense`.
  """
  types: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype)
  return Dense(fan_in, out, bias=bias, scale=scale, rngs=rngs, lora=config.lora, **types)


def make_norm(
  config: TransformerConfig, rngs: nnx.Rngs, width: int = 0
) -> nnx.RMSNorm | nnx.LayerNorm:
  """Returns the norm that the configuration names.

  Args:
    config: of the model.
    rngs: as Flax takes it; scales start at 1 and biases at 0.
    width: elements that are normed together; 0: the model's width.
  """
  options: dict[str, Any] = dict(
    epsilon=config.norm_epsilon, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
  )
  if config.norm == "rmsnorm":
    return nnx.RMSNorm(width or config.width, **options)
  # The variance is not the mean of squares less the square of the mean, as Flax computes it by
  # default: that difference loses the digits that both have in common.
  return nnx.LayerNorm(width or config.width, use_fast_variance=False, **options)
