"""A trained network as its Flax modules, on one device: to predict with it, or to look at it.

A stack is a set of factories, and its parameters are a canonical tree, as a checkpoint or
`jaxpipe.unplace` gives it. Put together they are ordinary Flax modules, in evaluation mode: dropout
is the identity, and norms use their moving averages.

    embed, *layers, head = modules(stack, params, state)
    x = run_layers(layers, embed(batch), batch)
    head.logits(x)                                         # or whatever methods the head has
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.stack.context import Context, leaves_of_rows, rows_alone
from jaxpipe.stack.module_spec import ModuleSpec, count_arguments
from jaxpipe.stack.paths import merged
from jaxpipe.stack.stack import LayerStack

Tree = Any


def modules(stack: LayerStack, params: Tree, state: Tree) -> list[Any]:
  """Rebuilds a trained stack's Flax modules in evaluation mode.

  Args:
    stack: whose modules they are.
    params: the canonical tree of its parameters.
    state: the canonical tree of its model state; `{}` or None where it has none.

  Returns:
    Embedding, layers and head, in order. They are typed `Any`, so that methods of their own can be
    called.
  """
  network = stack.network
  owned, states = network.split(params), network.split(state) if state else {}
  return [
    _module(spec, network.params_of(name, owned), states.get(name, {}))
    for name, spec in network.specs.items()
  ]


def head_module(stack: LayerStack, params: Tree) -> Any:
  """The head of a uniform stack alone, in evaluation mode, without looking at the layers.

  Args:
    stack: whose head it is.
    params: a tree with the parts `embed` and `head`, canonical.
  """
  return _module(stack.network.specs["head"], stack.head_params(params), {})


def run_layers(layers: Sequence[Any], x: Tree, batch: Tree) -> Tree:
  """Passes x through some layers that `modules` gave; returns what the last one returns.

  Args:
    layers: first to last.
    x: the first one's input, leaves [rows, ...].
    batch: what they read by `context.batch`, leaves [rows, ...].
  """
  rows = jnp.arange(len(leaves_of_rows(batch)[0][1]))
  context = Context(rows_alone(batch), training=False, key=None, rows=rows)
  for layer in layers:
    x = layer(*(x, context)[: count_arguments(type(layer))])
  return x


def evaluate(
  stack: LayerStack, params: Tree, state: Tree, batch: Tree
) -> tuple[jax.Array, jax.Array, Tree]:
  """Evaluates a whole batch as one microbatch.

  Args:
    stack, params, state: see `modules`.
    batch: leaves [B, ...].

  Returns:
    What the head returns: loss_sum [], weight [], metrics.
  """
  embed, *layers, head = modules(stack, params, state)
  out: tuple[jax.Array, jax.Array, Tree] = head(run_layers(layers, embed(batch), batch), batch)
  return out


def _module(spec: ModuleSpec, params: Tree, state: Tree) -> Any:
  """Rebuilds one module from its spec and values, in evaluation mode."""
  module = nnx.merge(spec.graph, merged(params, state))
  # NNX keeps the mode as an attribute of the module; `eval` sets it in this new one alone.
  module.eval()
  return module
