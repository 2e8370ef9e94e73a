"""Draws text from a trained stack: one compiled program over a fixed window of tokens.

There is no cache of keys and values, which would need the layers' cooperation: each token costs a
forward of the whole window. In return any stack whose head has `logits` can be sampled from, and
the cost is small beside that of training it. Prompts of all lengths share the program:

    window_T   p p p . . . . .    count = 3 tokens of the prompt; the rest of the T is arbitrary
               p p p a . . . .    a is drawn from the logits at position count - 1; count = 4
               ...                once it is full, the window moves on by one for every token

Shapes: T length of the window, V vocabulary, N tokens to draw.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.data import Tokenizer
from jaxpipe.stack.forward import head_module
from jaxpipe.stack.stack import LayerStack

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
  """Draws text from a model; its program is compiled once for each number of tokens to draw.

  Attributes:
    stack: the model; its head must have `logits(x) -> [B, T, V]`.
    params: canonical parameters, whole on one device.
    tokenizer: turns text into the model's ids and back.
    window: T, the most tokens that the model looks back; the sequence length it was trained on.
  """

  stack: LayerStack
  params: Tree
  tokenizer: Tokenizer
  window: int

  def __call__(self, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Returns the prompt and what the model says next.

    Args:
      prompt: how to begin; an empty one begins as a new line does. Only its end fits the window.
      length: tokens to draw.
      temperature: 0 takes the likeliest token, 1 draws from the model as it is.
      seed: the same seed gives the same text.
    """
    known = self.tokenizer.encode(prompt or "\n")[-self.window :]
    # Padded to one length, so that no prompt compiles anew.
    window_T = np.zeros(self.window, np.int32)
    window_T[: len(known)] = known
    keys = jax.random.split(jax.random.key(seed), length)
    start = (window_T, np.int32(len(known)))
    tokens = self._generate(self.params, start, keys, np.float32(temperature))
    return prompt + self.tokenizer.decode(tokens.tolist())

  @functools.cached_property
  def _generate(self) -> Any:
    return jax.jit(functools.partial(generate, self.stack))


def generate(
  stack: LayerStack, params: Tree, start: Tree, keys: jax.Array, temperature: jax.Array
) -> jax.Array:
  """Draws one token for every key.

  Args:
    stack: the model.
    params: canonical, whole on one device.
    start: `(window_T, count)`: int32 [T] whose first `count` entries (int32 [], 1 to T) are the
      prompt.
    keys: PRNG keys [N].
    temperature: float32 []; 0 takes the likeliest token.

  Returns:
    The tokens drawn, int32 [N].
  """

  def one(carry: Tree, key: jax.Array) -> tuple[Tree, jax.Array]:
    window_T, count = carry
    logits_TV = forward(stack, params, window_T)
    # Positions after the prompt hold anything: attention is causal, nothing read here sees them.
    token = _draw(logits_TV[count - 1], key, temperature)
    full = count == len(window_T)
    window_T = jnp.where(full, jnp.roll(window_T, -1), window_T)
    window_T = window_T.at[jnp.where(full, count - 1, count)].set(token)
    return (window_T, jnp.where(full, count, count + 1)), token

  return jax.lax.scan(one, start, keys)[1]


def forward(stack: LayerStack, params: Tree, window_T: jax.Array) -> jax.Array:
  """Runs the model without a pipeline and without dropout.

  Args:
    stack: the model.
    params: canonical.
    window_T: one row of tokens, int32 [T].

  Returns:
    Logits [T, V], at each position of what follows it.
  """
  zeros_1T = jnp.zeros((1, len(window_T)), jnp.int32)
  batch = {
    "tokens": window_T[None],
    "targets": zeros_1T,
    "weights": zeros_1T.astype(jnp.float32),
  }

  def layer(x: Tree, at: tuple[Tree, jax.Array]) -> tuple[Tree, None]:
    layer_params, i = at
    inputs: Any = dict(batch=batch, key=None, layer=i, microbatch=0, rows=jnp.arange(1))
    return stack.apply_layer(layer_params, x, False, inputs), None

  # A scan over all layers: the depth is in the shapes, so one compiled layer serves.
  x = stack.apply_embed(params["embed"], batch, training=False)
  layers = stack.network.shared.repeated(params["layers"])
  x, _ = jax.lax.scan(layer, x, (layers, jnp.arange(stack.depth)))
  head = head_module(stack, params)
  return head.logits(x)[0]


def _draw(logits_V: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
  """Draws one token, int32 []; at temperature 0 it is the likeliest."""
  # Dividing by a floor in place of 0 keeps the branch that is not taken finite.
  scaled_V = logits_V / jnp.maximum(temperature, 1e-6)
  drawn = jax.random.categorical(key, scaled_V)
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)
