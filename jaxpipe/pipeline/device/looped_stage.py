"""The stage of a uniform stack: a loop over its layers, each split once into F, R, I and W.

Only one layer is traced and split. Every action loops over the layers of its stage and calls a
slice of that one layer on the i-th layer's parameters, so that the program's size does not depend
on the number of layers:

    F   i = 0 .. L-1   y, saved = forward(params[i], x)         saved[i] -> cell [cell, i] of a pool
    I   i = L-1 .. 0   dx, saved = input_grad(params[i], dy)    dx becomes the dy of layer i-1
    B   i = L-1 .. 0   dx, dparams = backward(params[i], dy)    dparams added at [layer i]
    W   i = 0 .. L-1   dparams = weight_grad(saved[i])          dparams added at [layer i]

Nothing is stacked over layers and copied afterwards: what a layer leaves for a later action is
written straight into its place in a pool, and its gradient is added straight into the sum.

Running statistics that a layer's forward changes are summed over microbatches by F, at the layer's
place in pools of their own; a second forward does not sum them again.

What F keeps is the residual policy's choice. Under a policy that keeps the stage's input alone
(`full`), R runs the stage's forward again and fills the cells that F would have filled; where the
schedule has no R, each backward does so in pools that live inside that action only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.protocols import ActionArguments, Leaves, Scratch
from jaxpipe.pipeline.layer.residuals import Policy, Residuals
from jaxpipe.pipeline.layer.slices import LayerSplit, Saved
from jaxpipe.pipeline.layer.split import forward_only, split
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.pools import PoolLayout, Pools, SavedLayout, Storage
from jaxpipe.pipeline.storage.rings import Index, Tree
from jaxpipe.pipeline.table.program import Program
from jaxpipe.schedules import Kind
from jaxpipe.stack.network import check_alike
from jaxpipe.stack.protocol import UniformStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopedStage:
  """The actions of a stage of layers of one kind; `StageActions` describes the methods.

  Attributes:
    context: the device.
    split: slices of the one layer that stands for all.
    layers: L, layers of a stage.
    held: layers of all stages that the device holds.
    layout: where saved values lie between actions, and where F sums what it makes of statistics.
    rerun_layout: pools for what a backward's own second forward makes, alive inside that action
      only; None where no backward runs one.
    scratch: how R and I keep apart the pools that they read and those that they write.
  """

  context: DeviceContext
  split: LayerSplit
  layers: int
  held: int
  layout: PoolLayout
  rerun_layout: PoolLayout | None
  scratch: Mapping[Kind, Scratch]

  # Entries of `Carry.grads` that B and W add to.
  sums = ("layers",)

  @property
  def splits(self) -> tuple[LayerSplit, ...]:
    """The one layer's slices."""
    return (self.split,)

  @property
  def recomputes(self) -> bool:
    """Whether R has values to recompute where F kept part of each layer."""
    return Kind.R in self.scratch

  @property
  def rereads_input(self) -> bool:
    """Whether B and I run the forward again, from the stage's input."""
    return self.rerun_layout is not None

  def output(self, y: Leaves) -> Tree:
    """The activation that travels, as a tree."""
    return jax.tree.unflatten(jax.tree.structure(self.context.x), y)

  def cells(self, program: Program) -> tuple[np.ndarray, tuple[int, ...]]:
    """Cells of every saved value of every stage and microbatch, and the pools' lengths."""
    table, lengths = program.cells(self.layout.values)
    return table, (*lengths, *(self.held for _ in self.layout.sums))

  def allocate(self, layout: SavedLayout, lengths: Sequence[int]) -> Pools:
    """Pools of these lengths, their contents undefined, and sums of statistics."""
    return self.context.pools(layout.pools, lengths, len(layout.sums))

  def counted(self, pools: Pools) -> list[jax.Array]:
    """Sums over microbatches of what F has made of each leaf of statistics, [V * layers, ...]."""
    return pools[len(self.layout.cells) :]

  def saved_bytes(self) -> tuple[int, int]:
    """Bytes that F keeps of one stage and microbatch, and bytes that wait for its W."""
    cells = self.layout.cells
    sizes = [
      (value, math.prod(cells[value.pool].shape) * cells[value.pool].dtype.itemsize)
      for value in self.layout.values
    ]
    kept = sum(size for value, size in sizes if value.made is Kind.F)
    return kept, sum(size for value, size in sizes if value.last is Kind.W)

  def primal(self, arguments: ActionArguments, x: Leaves) -> Leaves:
    """Runs the layers on the stage's input and keeps nothing."""

    def layer(i: Index, x: Leaves) -> Leaves:
      return self.split.primal(*arguments.given(i), *x)[: self.split.y_count]

    return lax.fori_loop(0, self.layers, layer, x)

  def forward(
    self, arguments: ActionArguments, x: Leaves, storage: Storage
  ) -> tuple[Leaves, Storage]:
    """F: runs the layers, keeps what the backward wants, and sums their statistics."""
    keeps = any(value.made is Kind.F for value in self.layout.values)
    return self._run(arguments, x, storage, keeps=keeps, counts=True)

  def _run(
    self, arguments: ActionArguments, x: Leaves, storage: Storage, *, keeps: bool, counts: bool
  ) -> tuple[Leaves, Storage]:
    """Runs the layers.

    Args:
      arguments, x, storage: as for `forward`.
      keeps: whether `storage` holds what the slice F makes.
      counts: whether statistics are summed; a second forward would sum them twice.
    """
    one = self.split
    forward = one.forward if keeps else one.primal

    def layer(i: Index, carry: tuple[Leaves, Storage]) -> tuple[Leaves, Storage]:
      x, storage = carry
      out = forward(*arguments.given(i), *x)
      y, changed = out[: one.y_count], out[one.y_count : one.y_count + one.aux_count]
      if keeps:
        storage = storage.write(forward.makes, i, out[one.y_count + one.aux_count :])
      return y, storage.count(changed, arguments.first_layer + i) if counts else storage

    return _loop(self.layers, layer, (x, storage))

  def recompute_from_input(
    self, arguments: ActionArguments, x: Leaves, storage: Storage
  ) -> Storage:
    """R from the stage's input: the forward again, whose output nobody reads."""
    return self._run(arguments, x, storage, keeps=True, counts=False)[1]

  def recompute_from_kept(
    self, arguments: ActionArguments, storage: Storage, made: Storage
  ) -> Storage:
    """R from what F kept of every layer: returns `made` with what the policy dropped."""
    again = self.split.recompute
    assert again is not None  # else the stage has no scratch for R, and this is not called

    def layer(i: Index, carry: tuple[Leaves, Storage]) -> tuple[Leaves, Storage]:
      new = again(*arguments.given(i), *storage.read(again.reads, i))
      return [], carry[1].write(again.makes, i, new)

    return _loop(self.layers, layer, ([], made))[1]

  def backward(
    self, arguments: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, grads: Tree
  ) -> tuple[Leaves, Tree]:
    """B: the last layer first; each adds its weights' gradient to the sums as it goes."""
    kept = self._kept(arguments, storage, x)

    def layer(j: Index, carry: tuple[Leaves, Tree]) -> tuple[Leaves, Tree]:
      # `fori_loop` counts up only, and the backward begins at the last layer.
      (dy, grads), i = carry, self.layers - 1 - j
      out = self.split.backward(*arguments.given(i), *kept.read(self.split.backward.reads, i), *dy)
      dx, dp = out[: self.split.dx_count], out[self.split.dx_count :]
      return dx, _add(grads, dp, arguments.rows(i))

    return lax.fori_loop(0, self.layers, layer, (dy, grads))

  def input_grad(
    self, arguments: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, made: Storage
  ) -> tuple[Leaves, Storage]:
    """I: the last layer first; what W will read of each goes into `made`.

    `storage` and `made` share no pool: see `Scratch`.
    """
    slice_ = self.split.input_grad
    kept = self._kept(arguments, storage, x)
    # Under `full` without R, the forward has just been run a second time, into pools that die with
    # this action. What of it W will read is written to `made` as well, beside what I itself makes.
    numbers = self.layout.position.items()
    staying = [
      n for n, i in numbers if self.layout.values[i].made is Kind.I and n not in slice_.makes
    ]

    def layer(j: Index, carry: tuple[Leaves, Storage]) -> tuple[Leaves, Storage]:
      (dy, made), i = carry, self.layers - 1 - j
      out = slice_(*arguments.given(i), *kept.read(slice_.reads, i), *dy)
      dx, new = out[: self.split.dx_count], out[self.split.dx_count :]
      made = made.write(slice_.makes, i, new)
      return dx, made.write(staying, i, kept.read(staying, i))

    return _loop(self.layers, layer, (dy, made))

  def weight_grad(self, arguments: ActionArguments, storage: Storage, grads: Tree) -> Tree:
    """W: the layers in any order, for none of them reads another's gradient."""
    slice_ = self.split.weight_grad

    def layer(i: Index, grads: Tree) -> Tree:
      dp = slice_(*arguments.given(i), *storage.read(slice_.reads, i))
      return _add(grads, dp, arguments.rows(i))

    # Each turn adds into the carried sum at its own layer, in place: stacking the layers' gradients
    # and adding them afterwards would take a second array of their size.
    return {**grads, "layers": lax.fori_loop(0, self.layers, layer, grads["layers"])}

  def _kept(self, arguments: ActionArguments, storage: Storage, x: Leaves) -> Storage:
    """What a backward reads of the forward: from the pools, or from a second forward on x."""
    if self.rerun_layout is None:
      return storage
    cells, lengths = self.rerun_layout.one_each()
    storage = Storage(self.rerun_layout, self.allocate(self.rerun_layout, lengths), cells)
    return self._run(arguments, x, storage, keeps=True, counts=False)[1]


def _loop(
  layers: int,
  body: Callable[[Index, tuple[Leaves, Storage]], tuple[Leaves, Storage]],
  start: tuple[Leaves, Storage],
) -> tuple[Leaves, Storage]:
  """Runs `body(i, (leaves, storage))` for every layer.

  The loop carries the arrays of the storage alone: its layout and cells are constants of the trace.
  """
  storage = start[1]

  def run(i: Index, carry: tuple[Leaves, Pools]) -> tuple[Leaves, Pools]:
    leaves, after = body(i, (carry[0], dataclasses.replace(storage, pools=carry[1])))
    return leaves, after.pools

  leaves, pools = lax.fori_loop(0, layers, run, (start[0], storage.pools))
  return leaves, dataclasses.replace(storage, pools=pools)


def split_stack(
  stack: UniformStack,
  context: DeviceContext,
  params: Tree,
  inputs: Tree,
  layers: int,
  policy: Residuals | None,
  *,
  held: int,
  recompute: bool = False,
  fetch: bool = True,
) -> LoopedStage:
  """Splits one layer of a uniform stack, and returns the stage that runs `layers` of it.

  Args:
    stack: the stack whose layers are alike.
    context: the device, with the type of the travelling activation.
    params: stand-ins of one layer's parameters.
    inputs: stand-ins of its further inputs, `LayerInputs`.
    layers: L, layers of a stage.
    policy: what F keeps; None where only forwards run.
    held: layers of all stages that the device holds.
    recompute: whether the schedule has R.
    fetch: whether R and I may fetch what they read into scratch before they run; else what they
      make goes through the scratch.

  Raises:
    ValueError: the layer has a loop or branch that cannot be traced over a mesh, an output unlike
      its input, or nothing that bears a name of the policy's.
  """
  training = policy is not None
  keeps_input = bool(policy and policy.stage_input)

  def layer(params: Tree, inputs: Tree, x: Tree) -> tuple[Tree, Tree]:
    # y is cast to vary like x, whichever way the layer is traced: a leaf of y that depends on
    # nothing has a cotangent like every other.
    y, changed = stack.run_layer(params, x, training, inputs)
    check_alike(x, y)
    out: tuple[Tree, Tree] = vary(
      (y, jax.tree.map(jnp.asarray, changed)), axes_of(jax.tree.leaves(x))
    )
    return out

  def split_layer(keep: Policy | None) -> LayerSplit:
    return split(layer, params, inputs, context.x, keep, recompute=recompute and not keeps_input)

  one = policy.traced(split_layer) if policy else forward_only(layer, params, inputs, context.x)
  # Numbers, not positions: values that change their maker below keep the number that slices read.
  saved = dict(enumerate(one.saved)) if training else {}
  rerun_layout = None
  if keeps_input and recompute:
    saved = {n: _made_by(Kind.R, value) for n, value in saved.items()}
  elif keeps_input:
    # The second forward runs inside I: what F would leave for I dies with the action, and only what
    # W reads waits in a pool.
    rerun_layout = PoolLayout.of({n: v for n, v in saved.items() if v.made is Kind.F}, layers)
    saved = {n: _made_by(Kind.I, v) for n, v in saved.items() if v.last is Kind.W}
  changed = one.primal.outputs[one.y_count : one.y_count + one.aux_count]
  sums = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in changed]
  # A second forward inside I leaves nothing to be read from the pools.
  reads = {Kind.I: one.input_grad.reads if rerun_layout is None else ()}
  if one.recompute is not None:
    reads[Kind.R] = one.recompute.reads
  return LoopedStage(
    context=context,
    split=one,
    layers=layers,
    held=held,
    layout=PoolLayout.of(saved, layers, sums),
    rerun_layout=rerun_layout,
    scratch={kind: _scratch(saved, read, kind, layers, fetch) for kind, read in reads.items()},
  )


def _scratch(
  saved: Mapping[int, Saved], reads: Sequence[int], kind: Kind, layers: int, fetch: bool
) -> Scratch:
  """Chooses what of R or I goes through scratch: the smaller of what it reads and makes.

  It is what the action makes where it may not fetch.
  """
  read = PoolLayout.of({n: saved[n] for n in reads}, layers)
  made = PoolLayout.of({n: value for n, value in saved.items() if value.made is kind}, layers)
  before = fetch and read.one_each_bytes() <= made.one_each_bytes()
  return Scratch(read if before else made, before)


def _made_by(kind: Kind, value: Saved) -> Saved:
  """The value as made by another action than F; what I makes stays I's."""
  return value if value.made is Kind.I else dataclasses.replace(value, made=kind)


def _add(grads: Tree, leaves: Sequence[jax.Array], rows: Sequence[Index]) -> Tree:
  """Adds the leaves of one layer's gradient to the sums, each at the layer's row of its leaf."""
  sums, structure = jax.tree.flatten(grads)
  return jax.tree.unflatten(structure, list(map(rings.add, sums, leaves, rows)))
