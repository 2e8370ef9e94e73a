"""A trained network as its Flax modules, on one device: to look at what it has learned.

For parameters and state as they come from a checkpoint, canonical.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.stack.context import Context
from jaxpipe.stack.module_spec import wanted
from jaxpipe.stack.paths import merged
from jaxpipe.stack.stack import LayerStack

Tree = Any


def modules(stack: LayerStack, params: Tree, state: Tree) -> list[Any]:
  """Embedding, layers and head, in order, with these values and in evaluation mode.

  Args:
    stack: whose modules they are.
    params: canonical.
    state: canonical; `{}` where the stack has none.
  """
  network = stack.network
  own, kept = network.split(params), network.split(state) if state else {}
  made = []
  for name, spec in network.specs.items():
    values = merged(network.params_of(name, own), kept.get(name, {}))
    module = nnx.merge(spec.graph, values)
    module.eval()
    made.append(module)
  return made


def run_layers(layers: list[Any], x: Tree, batch: Tree) -> Tree:
  """Passes x through layers that `modules` gave; returns what the last one returns."""
  context = Context(batch, False, None, jnp.arange(len(jax.tree.leaves(batch)[0])))
  for layer in layers:
    x = layer(*(x, context)[: wanted(type(layer))])
  return x


def evaluate(
  stack: LayerStack, params: Tree, state: Tree, batch: Tree
) -> tuple[jax.Array, jax.Array, Tree]:
  """The batch as one microbatch; returns what the head returns: loss_sum, weight, metrics."""
  embed, *layers, head = modules(stack, params, state)
  out: tuple[jax.Array, jax.Array, Tree] = head(run_layers(layers, embed(batch), batch), batch)
  return out
