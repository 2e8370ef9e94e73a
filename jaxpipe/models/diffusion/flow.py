"""Sampling with a network that was trained by flow matching: from noise to data by Euler steps.

    dx/dt = velocity(x, t, label)       x(0) = noise, x(1) = data

References:
  Lipman et al., Flow matching for generative modeling, arXiv 2210.02747. Guidance: Ho and Salimans,
  Classifier-free diffusion guidance, arXiv 2207.12598.

Dims: B rows, N tokens, C channels of a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.stack.forward import modules, run_layers
from jaxpipe.stack.stack import LayerStack

# `(latents [B, N, C], time [B], labels int [B]) -> velocity [B, N, C]`.
Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def velocity_field(stack: LayerStack, params: Any, state: Any) -> Velocity:
  """Returns a trained network as a velocity field, on one device.

  Args:
    stack: the network, made by `jaxpipe.models.diffusion.dit.dit`.
    params: its canonical parameters.
    state: its canonical model state, which holds the frozen encoder.
  """
  embed, *layers, head = modules(stack, params, state)

  def velocity(latents: jax.Array, time: jax.Array, labels: jax.Array) -> jax.Array:
    batch = {"time": time, "labels": labels}
    predicted: jax.Array = head.velocity(run_layers(layers, embed.enter(latents, batch), batch))
    return predicted

  return velocity


def guide(velocity: Velocity, scale: float, no_class: int) -> Velocity:
  """Returns a field by classifier-free guidance: away from the prediction without a class.

  Args:
    velocity: field of a network that was trained on rows with a class and on rows without.
    scale: factor of the difference that the class makes; 1 leaves the field as it is.
    no_class: the label of rows without a class.
  """

  def guided(latents: jax.Array, time: jax.Array, labels: jax.Array) -> jax.Array:
    plain = velocity(latents, time, jnp.full_like(labels, no_class))
    return plain + scale * (velocity(latents, time, labels) - plain)

  return guided if scale != 1 else velocity


def euler(velocity: Velocity, noise: jax.Array, labels: jax.Array, steps: int) -> jax.Array:
  """Follows a velocity field from t = 0 to t = 1 by Euler's method.

  Args:
    velocity: the field.
    noise: [B, N, C], standard normal.
    labels: int [B], the class of each row.
    steps: number of steps of equal length.

  Returns:
    Latents [B, N, C].
  """

  def step(i: jax.Array, latents: jax.Array) -> jax.Array:
    time = jnp.full(len(latents), i / steps, latents.dtype)
    return latents + velocity(latents, time, labels) / steps

  return jax.lax.fori_loop(0, steps, step, noise)
