"""One stage: the layers of a chunk, run in a loop over the slices of one layer.

Nothing is stacked and then copied: what a layer leaves for a later action goes straight into its
cell, [cell, layer], and its gradient is added straight into the accumulator, [layer].

What F keeps is the residual policy's choice. Under a policy that keeps the stage's input alone, R
runs the stage's forward again and fills the cells that F would have filled; where the schedule has
no R, each backward does so in cells that live only inside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from jaxpipe.pipeline.layer.residuals import Policy, Residuals
from jaxpipe.pipeline.layer.slices import LayerSplit, Saved
from jaxpipe.pipeline.layer.split import forward_only, split
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.pools import PoolLayout, Pools, Storage
from jaxpipe.pipeline.storage.rings import Index, Tree
from jaxpipe.pipeline.table.program import Program
from jaxpipe.schedules import Kind
from jaxpipe.stack.stack import check_alike

Leaves = list[jax.Array]
# Of the chunk's i-th layer: its parameters, or its further inputs.
Inputs = Callable[[Index], Tree]


@dataclasses.dataclass(frozen=True)
class ActionArguments:
  """One action's arguments.

  Attributes:
    params: of the chunk's layers.
    first_layer: where the chunk begins.
    inputs: further ones, of the layers.
    weights: the device's parameters of all chunks.
  """

  params: Inputs
  first_layer: Index
  inputs: Inputs
  weights: Tree

  def given(self, i: Index) -> Leaves:
    """Leaves of the i-th layer's parameters and further inputs."""
    return jax.tree.leaves((self.params(i), self.inputs(i)))


@dataclasses.dataclass(frozen=True)
class Scratch:
  """How an action avoids to read and write the same pools, which XLA would then copy whole.

  Attributes:
    layout: of pools of the action's own, for what it reads or for what it makes: the smaller.
    before: whether it is what the action reads, fetched before it runs; else it is what it makes,
      which goes to its cells after.
  """

  layout: PoolLayout
  before: bool

  @classmethod
  def of(
    cls, saved: Mapping[int, Saved], reads: Sequence[int], kind: Kind, layers: int, fetch: bool
  ) -> Scratch:
    """The smaller of the two, or what is made where nothing is to be fetched."""
    read = PoolLayout.of({n: saved[n] for n in reads}, layers)
    made = PoolLayout.of({n: value for n, value in saved.items() if value.made is kind}, layers)
    before = fetch and read.one_each_bytes() <= made.one_each_bytes()
    return cls(read if before else made, before)


@dataclasses.dataclass(frozen=True)
class LoopedStage:
  """The actions of a stage of `layers` layers.

  Attributes:
    split: slices of one layer.
    layers: layers in a stage.
    layout: where saved values lie between actions.
    scratch: where they lie inside a backward that runs the forward again; None where none does.
    apart: what of R and I does not touch the pools itself.
    allocate: allocates pools, given the shapes of their cells and their lengths.
  """

  split: LayerSplit
  layers: int
  layout: PoolLayout
  scratch: PoolLayout | None
  apart: Mapping[Kind, Scratch]
  allocate: Callable[[Sequence[jax.ShapeDtypeStruct], Sequence[int]], Pools]

  sums = ("layers",)

  @property
  def splits(self) -> tuple[LayerSplit, ...]:
    """Slices of all that a stage may be."""
    return (self.split,)

  @property
  def recomputes(self) -> bool:
    """Whether R has anything to do where F kept something of every layer."""
    return Kind.R in self.apart

  @property
  def rereads_input(self) -> bool:
    """Whether I and B run the forward again, from the stage's input."""
    return self.scratch is not None

  def cells(self, program: Program) -> tuple[Any, tuple[int, ...]]:
    """Cells of every saved value of every stage and microbatch; see `Program.cells`."""
    return program.cells(self.layout.values)

  def counted(self, pools: Pools) -> dict[str, jax.Array]:
    """What F has made of the state: a uniform stack has none."""
    return {}

  def saved_bytes(self) -> tuple[int, int]:
    """What F keeps of one stage and microbatch, and what W waits for."""
    cells = self.layout.pools
    sizes = [
      (value, math.prod(cells[value.pool].shape) * cells[value.pool].dtype.itemsize)
      for value in self.layout.values
    ]
    kept = sum(size for value, size in sizes if value.made is Kind.F)
    return kept, sum(size for value, size in sizes if value.last is Kind.W)

  def remake(self, call: ActionArguments, x: Leaves, storage: Storage) -> Storage:
    """R, from the stage's input."""
    return self.forward(call, x, storage)[1]

  def primal(self, call: ActionArguments, x: Leaves) -> Leaves:
    """Runs the layers, keeping nothing."""
    return lax.fori_loop(0, self.layers, lambda i, x: self.split.primal(*call.given(i), *x), x)

  def forward(self, call: ActionArguments, x: Leaves, storage: Storage) -> tuple[Leaves, Storage]:
    """Runs the layers and keeps what the backward pass wants: F, or R of a stage's input."""
    forward = self.split.forward

    def layer(i: Index, carry: tuple[Leaves, Storage]) -> tuple[Leaves, Storage]:
      x, storage = carry
      out = forward(*call.given(i), *x)
      y, saved = out[: self.split.y_count], out[self.split.y_count :]
      return y, storage.write(forward.makes, i, saved)

    return _loop(self.layers, layer, (x, storage))

  def recompute(self, call: ActionArguments, storage: Storage, made: Storage) -> Storage:
    """R, where F kept something of every layer: returns `made` with what it makes, as I does."""
    again = self.split.recompute
    assert again is not None  # else the stage has nothing apart for R, and this is not called

    def layer(i: Index, carry: tuple[Leaves, Storage]) -> tuple[Leaves, Storage]:
      new = again(*call.given(i), *storage.read(again.reads, i))
      return [], carry[1].write(again.makes, i, new)

    return _loop(self.layers, layer, ([], made))[1]

  def backward(
    self, call: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, grads: Tree
  ) -> tuple[Leaves, Tree]:
    """B: returns dx, and `grads` with this microbatch's added at the chunk's layers.

    Args:
      call: the action's arguments.
      storage: with what F or R left; only read.
      x: the stage's input, where it is all that F kept and there is no R; else unused.
      dy: cotangents of the stage's output.
      grads: sums over microbatches, those named in `sums`.
    """
    kept = self._kept(call, storage, x)

    def layer(j: Index, carry: tuple[Leaves, Tree]) -> tuple[Leaves, Tree]:
      (dy, grads), i = carry, self.layers - 1 - j
      out = self.split.backward(*call.given(i), *kept.read(self.split.backward.reads, i), *dy)
      dx, dp = out[: self.split.dx_count], out[self.split.dx_count :]
      return dx, _add(grads, dp, call.first_layer + i)

    return lax.fori_loop(0, self.layers, layer, (dy, grads))

  def input_grad(
    self, call: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, made: Storage
  ) -> tuple[Leaves, Storage]:
    """I: returns dx, and `made` with what W waits for; arguments as for B.

    `storage` and `made` share no pool: see `Scratch`.
    """
    slice_ = self.split.input_grad
    kept = self._kept(call, storage, x)
    # What F would have kept for W lives in the scratch only; here it begins to wait.
    mine = self.layout.position.items()
    staying = [n for n, i in mine if self.layout.values[i].made is Kind.I and n not in slice_.makes]

    def layer(j: Index, carry: tuple[Leaves, Storage]) -> tuple[Leaves, Storage]:
      (dy, made), i = carry, self.layers - 1 - j
      out = slice_(*call.given(i), *kept.read(slice_.reads, i), *dy)
      dx, new = out[: self.split.dx_count], out[self.split.dx_count :]
      made = made.write(slice_.makes, i, new)
      return dx, made.write(staying, i, kept.read(staying, i))

    return _loop(self.layers, layer, (dy, made))

  def weight_grad(self, call: ActionArguments, storage: Storage, grads: Tree) -> Tree:
    """W: returns `grads` with this microbatch's added at the chunk's layers."""
    slice_ = self.split.weight_grad

    def layer(i: Index, grads: Tree) -> Tree:
      dp = slice_(*call.given(i), *storage.read(slice_.reads, i))
      return _add(grads, dp, call.first_layer + i)

    return {**grads, "layers": lax.fori_loop(0, self.layers, layer, grads["layers"])}

  def _kept(self, call: ActionArguments, storage: Storage, x: Leaves) -> Storage:
    """What F would have kept: from the forward run again, or from the pools."""
    if self.scratch is None:
      return storage
    cells, lengths = self.scratch.one_each()
    pools = self.allocate(self.scratch.pools, lengths)
    return self.forward(call, x, Storage(self.scratch, pools, cells))[1]


def _loop(
  layers: int,
  body: Callable[[Index, tuple[Leaves, Storage]], tuple[Leaves, Storage]],
  start: tuple[Leaves, Storage],
) -> tuple[Leaves, Storage]:
  """Runs `body(i, (leaves, storage))` for every layer; only pools that it writes are carried."""
  storage = start[1]

  def run(i: Index, carry: tuple[Leaves, Pools]) -> tuple[Leaves, Pools]:
    leaves, after = body(i, (carry[0], dataclasses.replace(storage, pools=carry[1])))
    return leaves, after.pools

  leaves, pools = lax.fori_loop(0, layers, run, (start[0], storage.pools))
  return leaves, dataclasses.replace(storage, pools=pools)


def cut_stack(
  stack: Any,
  params: Tree,
  inputs: Tree,
  x: Tree,
  layers: int,
  policy: Residuals | None,
  allocate: Callable[[Sequence[jax.ShapeDtypeStruct], Sequence[int]], Pools],
  *,
  recompute: bool = False,
  fetch: bool = True,
) -> LoopedStage:
  """Cuts one layer of a stack and returns the stage that runs `layers` of it.

  Args:
    stack: the `LayerStack`.
    params, inputs, x: arguments of one layer, or stand-ins.
    layers: layers in a stage.
    policy: what F keeps; None where only forwards run.
    allocate: see `Stage`.
    recompute: whether the schedule has R.
    fetch: whether R and I may fetch what they read before they run; see `Scratch`.

  Raises:
    ValueError: the layer has a loop or branch that cannot be traced over a mesh, an output unlike
      its input, or nothing that bears a name of the policy's.
  """
  training = policy is not None
  keeps_input = bool(policy and policy.stage_input)

  def layer(params: Tree, inputs: Tree, x: Tree) -> tuple[Tree, Tree]:
    # Like x, whichever way the layer is traced: a leaf of y that depends on nothing has a cotangent
    # like every other.
    y = stack.apply_layer(params, x, training, inputs)
    check_alike(x, y)
    return vary(y, axes_of(jax.tree.leaves(x))), ()

  def cut(keep: Policy | None) -> LayerSplit:
    return split(layer, params, inputs, x, keep, recompute=recompute and not keeps_input)

  one = policy.traced(cut) if policy else forward_only(layer, params, inputs, x)
  saved = dict(enumerate(one.saved)) if training else {}
  scratch = None
  if keeps_input and recompute:
    saved = {n: _made_by(Kind.R, value) for n, value in saved.items()}
  elif keeps_input:
    scratch = PoolLayout.of({n: v for n, v in saved.items() if v.made is Kind.F}, layers)
    saved = {n: _made_by(Kind.I, v) for n, v in saved.items() if v.last is Kind.W}
  # A second forward inside I leaves nothing to be read from the pools.
  reads = {Kind.I: one.input_grad.reads if scratch is None else ()}
  if one.recompute is not None:
    reads[Kind.R] = one.recompute.reads
  apart = {kind: Scratch.of(saved, numbers, kind, layers, fetch) for kind, numbers in reads.items()}
  return LoopedStage(one, layers, PoolLayout.of(saved, layers), scratch, apart, allocate)


def _made_by(kind: Kind, value: Saved) -> Saved:
  """A value that F would have made is made by another action; what I makes stays I's."""
  return value if value.made is Kind.I else dataclasses.replace(value, made=kind)


def _add(grads: Tree, leaves: Sequence[jax.Array], layer: Index) -> Tree:
  return rings.add(grads, jax.tree.unflatten(jax.tree.structure(grads), leaves), layer)
