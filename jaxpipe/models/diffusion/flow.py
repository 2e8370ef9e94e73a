"""From noise to data along a velocity field, by Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.stack.forward import modules, run_layers
from jaxpipe.stack.stack import LayerStack

Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def velocity_field(stack: LayerStack, params: Any, state: Any) -> Velocity:
  """The network as a function `latents [B, N, C], time [B], labels [B] -> velocity [B, N, C]`.

  Args:
    stack: made by `jaxpipe.models.diffusion.dit.dit`.
    params, state: canonical.
  """
  embed, *layers, head = modules(stack, params, state)

  def velocity(latents: jax.Array, time: jax.Array, labels: jax.Array) -> jax.Array:
    batch = {"time": time, "labels": labels}
    predicted: jax.Array = head.velocity(run_layers(layers, embed.enter(latents, batch), batch))
    return predicted

  return velocity


def guide(velocity: Velocity, scale: float, no_class: int) -> Velocity:
  """Classifier-free guidance: away from what the network would do without a class.

  Args:
    velocity: of a network that saw rows without a class.
    scale: 1 leaves it as it is.
    no_class: the label of such rows.
  """

  def guided(latents: jax.Array, time: jax.Array, labels: jax.Array) -> jax.Array:
    plain = velocity(latents, time, jnp.full_like(labels, no_class))
    return plain + scale * (velocity(latents, time, labels) - plain)

  return guided if scale != 1 else velocity


def euler(velocity: Velocity, noise: jax.Array, labels: jax.Array, steps: int) -> jax.Array:
  """Follows the field from t = 0 to 1.

  Args:
    velocity: the field.
    noise: [B, N, C], standard normal.
    labels: int [B].
    steps: number of steps of equal length.

  Returns:
    Latents [B, N, C].
  """

  def step(i: jax.Array, latents: jax.Array) -> jax.Array:
    time = jnp.full(len(latents), i / steps, latents.dtype)
    return latents + velocity(latents, time, labels) / steps

  return jax.lax.fori_loop(0, steps, step, noise)
