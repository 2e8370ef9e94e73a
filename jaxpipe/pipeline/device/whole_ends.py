"""Embedding and head, whole: used on the devices of the first and of the last stage.

The head's loss and gradient are taken at the end of the last stage's F, so that the logits live
inside one action and are never saved. The gradient of the loss waits in the ring `gradients` for
the last stage's backward, as a gradient that has arrived would. The embedding's gradient is added
when the cotangents of the first stage's input appear, by running the embedding a second time:
nothing of its first run is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.device.carry import Carry, Totals, accumulate, count
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.now import Now
from jaxpipe.pipeline.device.protocols import Leaves
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.layer.trace import lenient, trace
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.schedules import Kind
from jaxpipe.stack.protocol import UniformStack


@dataclasses.dataclass(frozen=True)
class WholeEnds:
  """Embedding and head, both on every device: the first stage uses the one, the last the other.

  `Ends` describes the methods.

  Attributes:
    context: the device.
    stack: whose embedding and head these are.
  """

  context: DeviceContext
  stack: UniformStack

  def held(self) -> dict[str, Tree]:
    """Nothing waits in the ring `vocabulary`."""
    return {}

  def heaviest(self) -> Any:
    """The jaxpr of the head's loss and gradient, with the logits of a microbatch."""
    context = self.context
    batch = context.microbatch(jnp.int32(0))
    value_and_grad = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
    frozen = context.frozen_of("head")
    args = context.params["head"], float_leaves(context.x), context.x, batch, frozen
    return trace(value_and_grad, *args).jaxpr

  def enter(self, carry: Carry, now: Now) -> Carry:
    """Does nothing: `input` embeds."""
    return carry

  def passes(self, carry: Carry, now: Now) -> Carry:
    """Does nothing: a whole head has no passes S and T."""
    return carry

  def input(self, carry: Carry, now: Now) -> Leaves:
    """The stage's input: embedded at the first stage, else what arrived."""

    def embed(ring: Tree) -> Leaves:
      batch = self.context.microbatch(now.microbatch)
      frozen = self.context.frozen_of("embed")
      x = lenient(self.embed)(self.context.params["embed"], frozen, batch)
      return jax.tree.leaves(self.context.vary(x))

    return embedded_or_arrived(embed, carry, now)

  def leave(self, carry: Carry, now: Now, y: Leaves) -> Carry:
    """After F: the loss of a microbatch that has left the last stage, and the gradient of it."""
    context = self.context
    # Whatever varies over the mesh is an argument and not closed over: see `lenient`.
    x = jax.tree.unflatten(jax.tree.structure(context.x), y)
    batch = context.microbatch(now.microbatch)
    args = context.params["head"], float_leaves(y), x, batch, context.frozen_of("head")
    if not context.training:

      def evaluate(totals: Totals) -> Totals:
        return count(totals, *lenient(self.loss)(*args))

      totals = now.at_end("last", [Kind.F], evaluate, lambda same: same, carry.totals)
      return carry._replace(totals=totals)

    def train(totals: Totals, grads: Tree, ring: Tree) -> tuple[Totals, Tree, Tree]:
      (value, aux), (dp, dy) = lenient(self.value_and_grad)(*args, context.loss_scale)
      # As if it had arrived: the last stage's backward reads its slot like every other stage's.
      ring = rings.store(ring, dy, now.gradients)
      return count(totals, value, aux), accumulate(grads, dp), ring

    totals, grads, ring = now.at_end(
      "last",
      [Kind.F],
      train,
      lambda *same: same,
      *(carry.totals, carry.grads["head"], carry.gradients),
    )
    return carry._replace(totals=totals, gradients=ring, grads={**carry.grads, "head": grads})

  def back_at_input(self, carry: Carry, now: Now, dx: Leaves) -> Carry:
    """After B or I: the embedding's gradient, where dx is that of the first stage's input."""

    def gradient(params: Tree, frozen: Tree, batch: Tree, dx: Leaves) -> Tree:
      def outputs(params: Tree) -> Leaves:
        # A leaf that does not depend on the parameters has a cotangent like every other.
        x = float_leaves(self.stack.apply_embed(params, batch, state=frozen))
        leaves: Leaves = vary(x, axes_of(dx))
        return leaves

      return jax.vjp(outputs, params)[1](dx)[0]

    def run(grads: Tree) -> Tree:
      batch = self.context.microbatch(now.microbatch)
      params, frozen = self.context.params["embed"], self.context.frozen_of("embed")
      return accumulate(grads, lenient(gradient)(params, frozen, batch, dx))

    # Differentiated inside the conditional, never through it: see `device.py`.
    kinds = (Kind.B, Kind.I)
    grads = now.at_end("first", kinds, run, lambda g: g, carry.grads["embed"])
    return carry._replace(grads={**carry.grads, "embed": grads})

  def value_and_grad(
    self,
    params: Tree,
    floats: Leaves,
    x: Tree,
    batch: Tree,
    frozen: Tree,
    scale: jax.Array | None,
  ) -> Any:
    """The head's sums as `loss` returns them, and the gradients of `loss_sum` times the scale."""
    if scale is None:
      value_and_grad = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
      return value_and_grad(params, floats, x, batch, frozen)

    def loss(params: Tree, floats: Leaves) -> Any:
      return self.loss(params, floats, x, batch, frozen)

    value, back, aux = jax.vjp(loss, params, floats, has_aux=True)
    one = vary(scale.astype(value.dtype), axes_of([value]))
    return (value, aux), back(one)

  def embed(self, params: Tree, frozen: Tree, batch: Tree) -> Tree:
    """The embedding's x; all that varies over the mesh is an argument, as `lenient` wants it."""
    return self.stack.apply_embed(params, batch, self.context.training, frozen)

  def loss(self, params: Tree, floats: Leaves, x: Tree, batch: Tree, frozen: Tree) -> Any:
    """The head's `loss_sum, (weight, metrics)`.

    Args:
      params: the head's.
      floats: float leaves of the last stage's output, by which the loss is differentiated.
      x: the last stage's output, of which only the other leaves are read.
      batch: the microbatch's own inputs.
      frozen: the head's frozen variables.
    """
    x = with_float_leaves(x, floats)
    return self.stack.apply_head(params, x, batch, self.context.training, frozen)


def embedded_or_arrived(embed: Callable[[Tree], Leaves], carry: Carry, now: Now) -> Leaves:
  """The stage's input: `embed(ring)` at the first stage of a path, else what lies in the ring.

  Asked for by F, and by R, B and I where they run the forward again: so it is embedded again, too.
  """

  def arrived(ring: Tree) -> Leaves:
    leaves: Leaves = rings.load(ring, now.activations)
    return leaves

  kinds = (Kind.F, Kind.R, Kind.B, Kind.I)
  leaves: Leaves = now.at_end("first", kinds, embed, arrived, carry.activations)
  return leaves
