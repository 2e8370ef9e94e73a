"""gMLP: layers of an MLP over channels and a gate that mixes patches, without attention.

    x -> norm -> U -> gelu -> [ a | b ] -> a * (W norm(b) + c) -> V -> + x
                                             over patches

References:
  Liu et al., Pay Attention to MLPs, arXiv:2105.08050 (section 2, figure 1).

Dims: as in `images`, and F hidden channels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.vision.images import PatchConfig, patch_network
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class GmlpConfig(PatchConfig):
  """Shape and arithmetic of the model, in addition to those of `PatchConfig`.

  Attributes:
    hidden: F, number of hidden channels, even: half of them is gated by the other half.

  Raises:
    ValueError: shapes that do not divide.
  """

  hidden: int = 256

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.hidden % 2:
      raise ValueError(f"{self.hidden} hidden channels cannot be halved; use an even number")


class SpatialGate(nnx.Module):
  """The spatial gating unit: half of the channels times a mixture of the other half over patches.

  [B, T, F] -> [B, T, F / 2].
  """

  def __init__(self, config: GmlpConfig, rngs: nnx.Rngs):
    half, T = config.hidden // 2, config.patches
    self.norm = nnx.LayerNorm(half, rngs=rngs, **config.dtypes)
    # Weights near zero and a bias of one: at first the gate lets everything through.
    near_zero = nnx.initializers.uniform(1e-3)
    one = nnx.initializers.ones
    self.mix = nnx.Linear(T, T, kernel_init=near_zero, bias_init=one, rngs=rngs, **config.dtypes)

  def __call__(self, x_BTF: jax.Array) -> jax.Array:
    open_BTf, gate_BTf = jnp.split(x_BTF, 2, axis=-1)
    mixed_BfT = self.mix(jnp.swapaxes(self.norm(gate_BTf), 1, 2))
    return open_BTf * jnp.swapaxes(mixed_BfT, 1, 2)


class Block(nnx.Module):
  """One layer: widen, gate, narrow; added to its input [B, T, D]."""

  def __init__(self, config: GmlpConfig, rngs: nnx.Rngs):
    self.rate = config.dropout
    self.norm = nnx.LayerNorm(config.width, rngs=rngs, **config.dtypes)
    self.up = nnx.Linear(config.width, config.hidden, rngs=rngs, **config.dtypes)
    self.gate = SpatialGate(config, rngs)
    self.down = nnx.Linear(config.hidden // 2, config.width, rngs=rngs, **config.dtypes)

  def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
    hidden_BTF = nnx.gelu(self.up(self.norm(x_BTD)))
    return x_BTD + context.dropout(self.down(self.gate(hidden_BTF)), self.rate)


def gmlp(config: GmlpConfig) -> LayerStack:
  """Returns the model as a stack; its batches have `image`, `label` and `weights`."""
  return patch_network(config, functools.partial(Block, config))
