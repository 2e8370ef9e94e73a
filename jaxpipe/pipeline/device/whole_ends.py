"""Embedding and head, whole: on the devices of the first and of the last stage.

The head's loss and gradient are taken at the end of the last stage's F, so that logits live inside
one action. The embedding's gradient is added when dx of the first stage's input appears, from a
second embedding forward: nothing of it is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.device.context import Carry, DeviceContext, Now, Totals, accumulate
from jaxpipe.pipeline.layer.equations import lenient, trace
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class WholeEnds:
  """Both ends, replicated over the stages and used on one each.

  Attributes:
    local: the device.
  """

  local: DeviceContext

  def held(self) -> dict[str, Tree]:
    """Shapes of a slot of the ring `vocabulary`: it has nothing."""
    return {}

  def heaviest(self) -> Any:
    """The jaxpr of what holds most at once: the head's loss and gradient."""
    local = self.local
    batch = local.microbatch(jnp.int32(0))
    value_and_grad = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
    args = local.params["head"], float_leaves(local.x), local.x, batch
    return trace(value_and_grad, *args).jaxpr

  def enter(self, state: Carry, now: Now) -> Carry:
    """Before F: nothing, for `input` embeds."""
    return state

  def passes(self, state: Carry, now: Now) -> Carry:
    """S and T: there are none."""
    return state

  def input(self, state: Carry, now: Now) -> Leaves:
    """The stage's input: embedded at the first stage, else what arrived."""

    def embed(ring: Tree) -> Leaves:
      batch = self.local.microbatch(now.microbatch)
      embed = functools.partial(self.local.stack.apply_embed, training=self.local.training)
      x = lenient(embed)(self.local.params["embed"], batch)
      return jax.tree.leaves(self.local.vary(x))

    arrived = lambda ring: rings.load(ring, now.activations)  # noqa: E731
    kinds = (Kind.F, Kind.R, Kind.B, Kind.I)
    leaves: Leaves = now.at_end("first", kinds, embed, arrived, state.activations)
    return leaves

  def leave(self, state: Carry, now: Now, y: Leaves) -> Carry:
    """After F: the loss of a microbatch that has left the last stage, and dy of its backward."""
    # Whatever varies over the mesh is an argument: see `lenient`.
    x = jax.tree.unflatten(jax.tree.structure(self.local.x), y)
    batch = self.local.microbatch(now.microbatch)
    args = self.local.params["head"], float_leaves(y), x, batch
    if not self.local.training:
      evaluate = lambda totals: count(totals, *lenient(self.loss)(*args))  # noqa: E731
      totals = now.at_end("last", [Kind.F], evaluate, lambda same: same, state.totals)
      return state._replace(totals=totals)

    def train(totals: Totals, grads: Tree, ring: Tree) -> tuple[Totals, Tree, Tree]:
      value_and_grad = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
      (value, aux), (dp, dy) = lenient(value_and_grad)(*args)
      ring = rings.store(ring, dy, now.gradients)
      return count(totals, value, aux), accumulate(grads, dp), ring

    totals, grads, ring = now.at_end(
      "last",
      [Kind.F],
      train,
      lambda *same: same,
      *(state.totals, state.grads["head"], state.gradients),
    )
    return state._replace(totals=totals, gradients=ring, grads={**state.grads, "head": grads})

  def back_at_input(self, state: Carry, now: Now, dx: Leaves) -> Carry:
    """After B or I: the embedding's gradient, where dx is that of the first stage's input."""

    def gradient(params: Tree, batch: Tree, dx: Leaves) -> Tree:
      def outputs(params: Tree) -> Leaves:
        # A leaf that does not depend on the parameters has a cotangent like every other.
        x = float_leaves(self.local.stack.apply_embed(params, batch))
        leaves: Leaves = vary(x, axes_of(dx))
        return leaves

      return jax.vjp(outputs, params)[1](dx)[0]

    def run(grads: Tree) -> Tree:
      batch = self.local.microbatch(now.microbatch)
      return accumulate(grads, lenient(gradient)(self.local.params["embed"], batch, dx))

    kinds = (Kind.B, Kind.I)
    grads = now.at_end("first", kinds, run, lambda g: g, state.grads["embed"])
    return state._replace(grads={**state.grads, "embed": grads})

  def loss(self, params: Tree, floats: Leaves, x: Tree, batch: Tree) -> Any:
    """The head's `loss_sum, (weight, metrics)`."""
    x = with_float_leaves(x, floats)
    return self.local.stack.apply_head(params, x, batch, self.local.training)


@dataclasses.dataclass(frozen=True)
class InnerEnds(WholeEnds):
  """Both ends inside the first and the last stage, which takes nothing, and returns the loss."""

  def heaviest(self) -> Any:
    """The jaxpr of nothing: what is inside stages is theirs."""
    return trace(lambda: ()).jaxpr

  def leave(self, state: Carry, now: Now, y: Leaves) -> Carry:
    """After F: the sums of a microbatch that has left the last stage."""
    result = jax.tree.unflatten(jax.tree.structure(self.local.x), y)

    def add(totals: Totals) -> Totals:
      return count(totals, *self.local.stack.apply_head({}, result, {}))

    totals = now.at_end("last", [Kind.F], add, lambda same: same, state.totals)
    return state._replace(totals=totals)


def count(totals: Totals, loss: jax.Array, aux: tuple[jax.Array, Tree]) -> Totals:
  """Adds one microbatch's sums."""
  return Totals(*accumulate(tuple(totals), (loss, *aux)))
