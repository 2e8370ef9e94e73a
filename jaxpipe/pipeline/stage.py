"""One stage: the layers of a chunk, run in a loop over the slices of one layer.

Nothing is stacked and then copied: what a layer keeps goes straight into its place in the ring,
[slot, layer], and its gradient is added straight into the accumulator, [layer].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jaxpipe.pipeline import rings
from jaxpipe.pipeline.residuals import Residuals
from jaxpipe.pipeline.rings import Index, Tree
from jaxpipe.pipeline.split import LayerSplit, float_leaves, split

Leaves = list[jax.Array]
# inputs(i) are the further inputs of the chunk's i-th layer.
Inputs = Callable[[Index], Tree]


@dataclasses.dataclass(frozen=True)
class Call:
  """One action's arguments: the device's parameters, where its chunk begins, its inputs."""

  params: Tree
  first_layer: Index
  inputs: Inputs

  def given(self, i: Index) -> Leaves:
    """Leaves of the i-th layer's parameters and further inputs."""
    return jax.tree.leaves((rings.get(self.params, self.first_layer + i), self.inputs(i)))


@dataclasses.dataclass(frozen=True)
class Stage:
  """The actions of a stage of `layers` layers.

  Attributes:
    split: slices of one layer.
    layers: layers in a stage.
    recompute: keep the stage's input alone and run the forward again before the backward.
    allocate: allocates a ring, given the shapes of a slot and their number.
  """

  split: LayerSplit
  layers: int
  recompute: bool
  allocate: Callable[[Tree, int], Tree]

  def slots(self, x: Leaves) -> dict[str, list[jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of one slot of each ring, given the leaves of the stage's input."""
    inputs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in x]
    return {
      "activations": inputs,
      "gradients": float_leaves(inputs),
      "residuals": inputs if self.recompute else self._of_layers(self.split.kept),
      "waiting": self._of_layers(self.split.waiting),
    }

  def primal(self, call: Call, x: Leaves) -> Leaves:
    """Runs the layers, keeping nothing."""
    return lax.fori_loop(0, self.layers, lambda i, x: self.split.primal(*call.given(i), *x), x)

  def forward(self, call: Call, x: Leaves, ring: Tree, slot: Index) -> tuple[Leaves, Tree]:
    """F: runs the layers and keeps in `ring`, at `slot`, what the backward pass wants."""
    if self.recompute:
      return self.primal(call, x), rings.put(ring, x, slot)
    return self._forward(call, x, ring, slot)

  def backward(
    self, call: Call, ring: Tree, slot: Index, dy: Leaves, grads: Tree
  ) -> tuple[Leaves, Tree]:
    """B: returns dx, and `grads` with this microbatch's added at the chunk's layers."""
    ring, slot = self._kept(call, ring, slot)

    def layer(j: Index, carry: tuple[Leaves, Tree]) -> tuple[Leaves, Tree]:
      (dy, grads), i = carry, self.layers - 1 - j
      out = self.split.backward(*call.given(i), *rings.get(ring, slot, i), *dy)
      dx, dp = out[: self.split.dx_count], out[self.split.dx_count :]
      return dx, _add(grads, dp, call.first_layer + i)

    return lax.fori_loop(0, self.layers, layer, (dy, grads))

  def input_grad(
    self, call: Call, ring: Tree, slot: Index, dy: Leaves, waiting: Tree, waiting_slot: Index
  ) -> tuple[Leaves, Tree]:
    """I: returns dx, and `waiting` with what W needs written at `waiting_slot`."""
    ring, slot = self._kept(call, ring, slot)

    def layer(j: Index, carry: tuple[Leaves, Tree]) -> tuple[Leaves, Tree]:
      (dy, waiting), i = carry, self.layers - 1 - j
      out = self.split.input_grad(*call.given(i), *rings.get(ring, slot, i), *dy)
      dx, wait = out[: self.split.dx_count], out[self.split.dx_count :]
      return dx, rings.put(waiting, wait, waiting_slot, i)

    return lax.fori_loop(0, self.layers, layer, (dy, waiting))

  def weight_grad(self, call: Call, waiting: Tree, slot: Index, grads: Tree) -> Tree:
    """W: returns `grads` with this microbatch's added at the chunk's layers."""

    def layer(i: Index, grads: Tree) -> Tree:
      dp = self.split.weight_grad(*call.given(i), *rings.get(waiting, slot, i))
      return _add(grads, dp, call.first_layer + i)

    return lax.fori_loop(0, self.layers, layer, grads)

  def _forward(self, call: Call, x: Leaves, ring: Tree, slot: Index) -> tuple[Leaves, Tree]:
    def layer(i: Index, carry: tuple[Leaves, Tree]) -> tuple[Leaves, Tree]:
      x, ring = carry
      out = self.split.forward(*call.given(i), *x)
      y, kept = out[: self.split.x_count], out[self.split.x_count :]
      return y, rings.put(ring, kept, slot, i)

    return lax.fori_loop(0, self.layers, layer, (x, ring))

  def _kept(self, call: Call, ring: Tree, slot: Index) -> tuple[Tree, Index]:
    """The ring and slot where the layers' residuals lie, recomputed first if they must be."""
    if not self.recompute:
      return ring, slot
    scratch = self.allocate(self._of_layers(self.split.kept), 1)
    return self._forward(call, rings.get(ring, slot), scratch, 0)[1], 0

  def _of_layers(self, shapes: Sequence[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((self.layers, *s.shape), s.dtype) for s in shapes]


def cut_stack(
  stack: Any,
  params: Tree,
  inputs: Tree,
  x: Tree,
  layers: int,
  policy: Residuals | None,
  allocate: Callable[[Tree, int], Tree],
  axes: Sequence[str] = (),
) -> Stage:
  """Cuts one layer of a stack and returns the stage that runs `layers` of it.

  Args:
    stack: the `LayerStack`.
    params, inputs, x: arguments of one layer, or stand-ins.
    layers: layers in a stage.
    policy: what F keeps; None where only forwards run.
    allocate: see `Stage`.
    axes: mesh axes over which activations vary.

  Raises:
    ValueError: the layer has a loop or branch that cannot be traced over a mesh.
  """
  training = policy is not None

  def layer(params: Tree, inputs: Tree, x: Tree) -> Tree:
    with rings.explain_varying("layers[0]"):
      return rings.vary(stack.apply_layer(params, x, training, inputs), axes)

  one = split(layer, params, inputs, x, policy.layer if policy else None)
  return Stage(one, layers, bool(policy and policy.stage_input), allocate)


def _add(grads: Tree, leaves: Sequence[jax.Array], layer: Index) -> Tree:
  return rings.add(grads, jax.tree.unflatten(jax.tree.structure(grads), leaves), layer)
