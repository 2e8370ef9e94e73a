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

from jaxpipe.stack.context import Context, leaves_of_rows, rows_alone
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.from_modules import Loss, as_given
from jaxpipe.stack.module.given import Given, share_again
from jaxpipe.stack.module.modes import set_mode
from jaxpipe.stack.module.parts import module_label
from jaxpipe.stack.module.signature import plan_call
from jaxpipe.stack.module_spec import ModuleSpec
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

  Raises:
    StackError: the stack has model state, and none is given.
  """
  if stack.has_state and not state:
    raise StackError("the stack has model state (statistics, frozen variables); give it as well")
  network = stack.network
  owned, states = network.split(params), network.split(state) if state else {}
  return [
    _module(spec, network.params_of(name, owned), network.state_of(name, states))
    for name, spec in network.specs.items()
  ]


def given_back(stack: LayerStack, params: Tree, state: Tree) -> list[Any]:
  """Gives trained values back as the objects that a stack was made from.

  Args:
    stack: whose modules they are.
    params: the canonical tree of its parameters.
    state: the canonical tree of its model state; `{}` or None where it has none.

  Returns:
    A new object for each module, in order: NNX modules in the mode in which they were given, for
    Linen modules their variables, functions as they were, for factories what they build. Modules
    that shared variables share them. Of a `LayerStack`, embedding, layers and head; of modules in a
    row, these alone.
  """
  network = stack.network
  owned, states = network.split(params), network.split(state) if state else {}
  made: dict[str, Any] = {}
  again: dict[int, Any] = {}  # one new object for an object that stands several times
  for name, spec in network.specs.items():
    key = id(spec.factory) if isinstance(spec.factory, Given) else id(name)
    if key not in again:
      again[key] = spec.build(network.params_of(name, owned), network.state_of(name, states))
    made[name] = again[key]
  share_again(network.given(), made)
  if issubclass(network.specs["head"].kind, Loss):
    del made["embed"], made["head"]
  return [as_given(module) for module in made.values()]


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
  rows, batch = jnp.arange(len(leaves_of_rows(batch)[0][1])), rows_alone(batch)
  context = Context(batch, training=False, call_key=None, rows=rows)
  for layer in layers:
    call: Any = type(layer).__call__
    plan = plan_call(module_label(layer), call, arguments=1, bound=False)
    args, named = plan.arguments(False, (x,), context, batch)
    x = layer(*args, **named)
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
  module = spec.build(params, state)
  set_mode(module, training=False)
  return module
