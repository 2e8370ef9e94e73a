"""Deep Speech 2, small: convolutions over a spectrogram, recurrent layers in both directions, CTC.

    mels [B, T, F] -> convolution -> convolution -> GRUs [B, T / 4, D] -> logits -> CTC loss

The layers are unlike, each with BatchNorm: two convolutions over time and frequency, of which each
halves both, then GRUs. A GRU's inputs are multiplied by its weights for all frames at once, and
normalised over batch and time (the paper's sequence-wise normalisation); only what depends on the
frame before is in the loop. Both directions are one loop over a pair, and their outputs are added.

Dims: B rows, T frames (after the convolutions a quarter), F bands, C channels, D width, G = 3 D
gates of a GRU, K symbols.

References:
  Amodei et al., Deep Speech 2 (arXiv 1512.02595).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.batch_norm import BatchNorm
from jaxpipe.models.speech.ctc import ctc_losses, edit_distances, hear
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack

_SHRINK = 4  # frames in for each frame out: two convolutions of stride 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSpeechConfig:
  """Shape and arithmetic of the model.

  Attributes:
    bands: F, number of frequency bands of a spectrogram, a multiple of 4.
    symbols: K, number of symbols, the blank included.
    channels: C, number of channels of both convolutions.
    width: D, width of every GRU and of each of its directions.
    recurrent: number of GRUs.
    dropout: dropout rate of every GRU's input, in [0, 1).
    dtype: dtype of parameters, statistics and arithmetic.

  Raises:
    ValueError: bands that cannot be halved twice.
  """

  bands: int
  symbols: int
  channels: int = 16
  width: int = 96
  recurrent: int = 3
  dropout: float = 0.1
  dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if self.bands % _SHRINK:
      raise ValueError(f"bands {self.bands} cannot be halved twice; use a multiple of {_SHRINK}")

  def linear(self, wide: int, narrow: int, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """Returns a dense layer from `wide` to `narrow` elements, with a bias or without."""
    types = dict(dtype=self.dtype, param_dtype=self.dtype)
    return nnx.Linear(wide, narrow, use_bias=bias, rngs=rngs, **types)

  def convolution(self, channels: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Returns a convolution of 5x5 from so many channels to C, which halves frames and bands."""
    types = dict(dtype=self.dtype, param_dtype=self.dtype)
    return nnx.Conv(channels, self.channels, (5, 5), strides=2, use_bias=False, rngs=rngs, **types)

  def norm(self, features: int, rngs: nnx.Rngs) -> BatchNorm:
    """Returns a batch norm of features; its running averages move by a twentieth a step."""
    types = dict(dtype=self.dtype, param_dtype=self.dtype)
    return BatchNorm(features, momentum=0.95, rngs=rngs, **types)


class Embed(nnx.Module):
  """The embedding, the first convolution: `batch["mels"]` [B, T, F] -> [B, T / 2, F / 2, C]."""

  def __init__(self, config: DeepSpeechConfig, rngs: nnx.Rngs):
    self.convolution = config.convolution(1, rngs)
    self.norm = config.norm(config.channels, rngs)

  def __call__(self, batch: Any) -> jax.Array:
    return clipped(self.norm(self.convolution(batch["mels"][..., None])))


class Convolution(nnx.Module):
  """The second convolution: [B, T / 2, F / 2, C] -> [B, T / 4, F / 4 * C], bands and channels."""

  def __init__(self, config: DeepSpeechConfig, rngs: nnx.Rngs):
    self.convolution = config.convolution(config.channels, rngs)
    self.norm = config.norm(config.channels, rngs)

  def __call__(self, x_BTFC: jax.Array, context: Context) -> jax.Array:
    out = clipped(self.norm(self.convolution(x_BTFC)))
    return out.reshape(*out.shape[:2], -1)


class Recurrent(nnx.Module):
  """A GRU in both directions: [B, T, wide] -> [B, T, D]."""

  def __init__(self, config: DeepSpeechConfig, wide: int, rngs: nnx.Rngs):
    self.rate, D = config.dropout, config.width
    self.inputs = config.linear(wide, 6 * D, rngs, bias=False)
    self.norm = config.norm(6 * D, rngs)
    init = nnx.initializers.orthogonal(column_axis=1)
    # One matrix for each direction.
    draws = [init(rngs.params(), (D, 3 * D), config.dtype) for _ in range(2)]
    self.recurrent = nnx.Param(jnp.stack(draws))

  def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
    inputs_BTG = self.norm(self.inputs(context.dropout(x_BTD, self.rate)))
    forwards, backwards = jnp.split(inputs_BTG.swapaxes(0, 1), 2, axis=-1)
    # The second of the pair runs over the frames from the last to the first.
    both_T2BG = jnp.stack([forwards, backwards[::-1]], axis=1)
    start = jnp.zeros_like(both_T2BG[0, ..., : self.recurrent.shape[1]])
    _, out_T2BD = jax.lax.scan(functools.partial(gru, self.recurrent[...]), start, both_T2BG)
    return (out_T2BD[:, 0] + out_T2BD[::-1, 1]).swapaxes(0, 1)


def gru(weights_2DG: jax.Array, h_2BD: jax.Array, inputs_2BG: jax.Array) -> Any:
  """One frame of two GRUs, as a scan's body (Cho et al., arXiv 1406.1078).

  Args:
    weights_2DG: recurrent matrices of both directions: update, reset, candidate.
    h_2BD: states after the frame before.
    inputs_2BG: what the frames' inputs give to each gate.

  Returns:
    The new states, as carry and as output.
  """
  own_2BG = jnp.einsum("zBD,zDG->zBG", h_2BD, weights_2DG)
  (update_in, reset_in, new_in), (update_h, reset_h, new_h) = (
    jnp.split(part, 3, axis=-1) for part in (inputs_2BG, own_2BG)
  )
  update, reset = nnx.sigmoid(update_in + update_h), nnx.sigmoid(reset_in + reset_h)
  # The reset gate is applied to the product, not to the state: one product serves all three gates.
  h_2BD = update * h_2BD + (1 - update) * jnp.tanh(new_in + reset * new_h)
  return h_2BD, h_2BD


class Head(nnx.Module):
  """The head: CTC loss (nats) summed over rows, sum of the weights, metrics.

  Reads `frames` int [B], the frames of each spectrogram, `labels` int [B, N], the symbols of each
  word and then zeros, and `weights` float [B]. Metrics, both weighted: `errors`, the edit distance
  between decoded word and label; `said`, the number of symbols of the label.
  """

  def __init__(self, config: DeepSpeechConfig, rngs: nnx.Rngs):
    self.out = config.linear(config.width, config.symbols, rngs)

  def __call__(self, x_BTD: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, Any]:
    logits_BTK, weights_B = self.out(x_BTD), batch["weights"].astype(x_BTD.dtype)
    frames_B = -(-batch["frames"] // _SHRINK)
    losses_B = ctc_losses(logits_BTK, frames_B, batch["labels"])
    errors_B = edit_distances(hear(logits_BTK, frames_B), batch["labels"])
    said_B = (batch["labels"] > 0).sum(axis=1)
    metrics = {"errors": jnp.sum(errors_B * weights_B), "said": jnp.sum(said_B * weights_B)}
    return jnp.sum(losses_B * weights_B), jnp.sum(weights_B), metrics


def clipped(x: jax.Array) -> jax.Array:
  """The paper's activation: a ReLU that is clipped at 20."""
  return jnp.clip(x, 0, 20)


def deep_speech(config: DeepSpeechConfig) -> LayerStack:
  """Returns the model as a stack.

  `jaxpipe.data.experiments.spoken_digits.SpokenDigits.batch` makes batches for it.
  """
  wide = config.bands // _SHRINK * config.channels
  first = functools.partial(Recurrent, config, wide)
  others = functools.partial(Recurrent, config, config.width)
  return LayerStack(
    embed=functools.partial(Embed, config),
    layers=[functools.partial(Convolution, config), first, *[others] * (config.recurrent - 1)],
    head=functools.partial(Head, config),
  )
