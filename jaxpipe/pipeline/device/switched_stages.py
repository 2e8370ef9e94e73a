"""Stages that are not alike: every stage a function of its own, behind a switch over its number.

Each stage of a packed stack is split whole into F, R, I and W, as if it were one layer. Every
action is a `lax.switch` over the stage's number, so that the one program holds the code of all
stages and each device runs that of its own:

    lax.switch(stage, [F of stage 0, F of stage 1, ...], x, pools)

A switch's branches must take and return the same types. What travels between stages is therefore
packed into one flat buffer for each dtype, as wide as the widest boundary needs; parameters and
state lie in rows of one width; and saved values lie in arenas, of which every stage has a part.

    boundaries[s]   [width] buffers   -> the input leaves of stage s
    packed.params   [V, width] rows   -> the parameter leaves of stage s
    ArenaLayout     arenas [rows, ROW] -> the saved values of stage s, one record each kind

Dropout and data are keyed by microbatch, row and layer number, never by stage or device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.parallel.flat import Flat, read_span, write_span
from jaxpipe.pipeline.device.boundaries import Boundaries
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.protocols import ActionArguments, Leaves, Scratch
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.residuals import Policy, Residuals
from jaxpipe.pipeline.layer.slices import LayerSplit, Slice
from jaxpipe.pipeline.layer.split import Layer, forward_only, split
from jaxpipe.pipeline.layer.trace import lenient
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.pipeline.storage.arena_layout import ArenaLayout
from jaxpipe.pipeline.storage.arenas import Arenas
from jaxpipe.pipeline.storage.pools import PoolLayout, Pools, SavedLayout, Storage
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.pipeline.table.program import Program
from jaxpipe.schedules import Kind
from jaxpipe.stack.context import microbatch_inputs
from jaxpipe.stack.protocol import PackedStack


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SwitchedStages:
  """The actions of all stages of a packed stack; `StageActions` describes the methods.

  Attributes:
    packed: the stack, cut into stages.
    context: the device; the type of the travelling activation is not in it, see `boundaries`.
    splits: for each stage, its slices.
    boundaries: how the input and output of each stage lie in the buffers that travel.
    layout: where saved values lie, and where F sums what it makes of the model state.
    rereads_input: whether B and I run the forward again, from the stage's input.
    shared: leaves that several stages read, by their owner's path.
    state: this device's rows of model state, dtype -> [V, width].
  """

  packed: PackedStack
  context: DeviceContext
  splits: tuple[LayerSplit, ...]
  boundaries: Boundaries
  layout: ArenaLayout
  rereads_input: bool
  shared: Mapping[str, jax.Array]
  state: Mapping[str, jax.Array]

  # A stage is one row of the packed parameters.
  layers = 1
  sums = ("layers", "shared")

  @property
  def rerun_layout(self) -> PoolLayout | None:
    """None: a stage's backward that runs the forward again is one function, without pools."""
    return None

  @property
  def scratch(self) -> Mapping[Kind, Scratch]:
    """Empty: no action reads an arena that it writes."""
    return {}

  @property
  def recomputes(self) -> bool:
    """Whether R has anything to do at any stage."""
    return any(one.recompute for one in self.splits)

  def output(self, y: Leaves) -> Tree:
    """What the last stage returns, out of the buffers that travel."""
    return self.boundaries.result.unpack(dict(zip(self.boundaries.widths, y, strict=True)))

  def cells(self, program: Program) -> tuple[np.ndarray, tuple[int, ...]]:
    """The row at which each record begins, and the lengths of arenas and of sums of state."""
    table, rows = self.layout.arenas.cells(program)
    longest = (int(n) for n in rows.max(0, initial=0))
    return table, (*longest, *(self._chunks for _ in self.layout.sums))

  @property
  def _chunks(self) -> int:
    return next((len(leaf) for leaf in self.state.values()), 1)

  def allocate(self, layout: SavedLayout, lengths: Sequence[int]) -> Pools:
    """Arenas, then sums of model state."""
    return self.context.pools(layout.pools, lengths, len(layout.sums))

  def counted(self, pools: Pools) -> list[jax.Array]:
    """Sums over microbatches of what F has made of the state: for each dtype [V, width]."""
    return [pools[self.layout.sum_of(name)] for name in self.layout.sums]

  def saved_bytes(self) -> tuple[int, int]:
    """Bytes that F keeps of one microbatch and that wait for its W, at the stage with most."""
    arenas, each = self.layout.arenas, range(len(self.splits))
    kept = max(arenas.bytes_of(s, made=Kind.F) for s in each)
    return kept, max(arenas.bytes_of(s, last=Kind.W) for s in each)

  # Actions. Each runs `run(s, ...)` of the stage that the tick names, behind the switch.

  def primal(self, arguments: ActionArguments, x: Leaves) -> Leaves:
    """Runs the stage and keeps nothing."""

    def run(s: int, x: Leaves) -> Leaves:
      out = self.splits[s].primal(*self._given(s, arguments), *self.boundaries.input(s, x))
      return self.boundaries.pack_output(s, out[: self.splits[s].y_count])

    return self._switch(arguments, run, x)

  def forward(
    self, arguments: ActionArguments, x: Leaves, storage: Storage
  ) -> tuple[Leaves, Storage]:
    """F: runs the stage, keeps what the backward wants, and sums its model state."""

    def run(s: int, x: Leaves, pools: Pools) -> tuple[Leaves, Pools]:
      one = self.splits[s]
      out = one.forward(*self._given(s, arguments), *self.boundaries.input(s, x))
      y, aux = out[: one.y_count], out[one.y_count : one.y_count + one.aux_count]
      saved = out[one.y_count + one.aux_count :]
      pools = self.layout.arenas.write(s, one.forward.makes, saved, pools, storage.cells)
      return self.boundaries.pack_output(s, y), self._sum_state(s, aux, pools, arguments)

    y, pools = self._switch(arguments, run, x, storage.pools)
    return y, dataclasses.replace(storage, pools=pools)

  def recompute_from_input(
    self, arguments: ActionArguments, x: Leaves, storage: Storage
  ) -> Storage:
    """R from the stage's input."""

    def run(s: int, x: Leaves, pools: Pools) -> Pools:
      again = self.splits[s].recompute
      # A policy may leave one stage nothing to compute anew, and another something.
      if again is None:
        return pools
      made = again(*self._given(s, arguments), *self.boundaries.input(s, x))
      return self.layout.arenas.write(s, again.makes, made, pools, storage.cells)

    return dataclasses.replace(storage, pools=self._switch(arguments, run, x, storage.pools))

  def recompute_from_kept(
    self, arguments: ActionArguments, storage: Storage, made: Storage
  ) -> Storage:
    """R from what F kept."""

    def run(s: int, pools: Pools) -> Pools:
      again = self.splits[s].recompute
      if again is None:
        return pools
      new = again(*self._given(s, arguments), *self._read(s, again, storage))
      return self.layout.arenas.write(s, again.makes, new, pools, made.cells)

    return dataclasses.replace(made, pools=self._switch(arguments, run, made.pools))

  def backward(
    self, arguments: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, grads: Tree
  ) -> tuple[Leaves, Tree]:
    """B: the input's cotangents, packed, and the sums with this microbatch's gradients."""

    def run(s: int, x: Leaves, dy: Leaves, grads: Tree) -> tuple[Leaves, Tree]:
      one = self.splits[s]
      out = one.backward(*self._backward_arguments(s, one.backward, arguments, storage, x, dy))
      dx, dparams = out[: one.dx_count], out[one.dx_count :]
      return self.boundaries.pack_cotangents(s, dx), self._add(s, dparams, grads, arguments)

    return self._switch(arguments, run, x, dy, grads)

  def input_grad(
    self, arguments: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, made: Storage
  ) -> tuple[Leaves, Storage]:
    """I: the input's cotangents, packed, and the arenas with what W waits for."""

    def run(s: int, x: Leaves, dy: Leaves, pools: Pools) -> tuple[Leaves, Pools]:
      one = self.splits[s]
      out = one.input_grad(*self._backward_arguments(s, one.input_grad, arguments, storage, x, dy))
      dx, new = out[: one.dx_count], out[one.dx_count :]
      pools = self.layout.arenas.write(s, one.input_grad.makes, new, pools, made.cells)
      return self.boundaries.pack_cotangents(s, dx), pools

    dx, pools = self._switch(arguments, run, x, dy, made.pools)
    return dx, dataclasses.replace(made, pools=pools)

  def weight_grad(self, arguments: ActionArguments, storage: Storage, grads: Tree) -> Tree:
    """W: the sums with this microbatch's gradients."""

    def run(s: int, grads: Tree) -> Tree:
      slice_ = self.splits[s].weight_grad
      dparams = slice_(*self._given(s, arguments), *self._read(s, slice_, storage))
      return self._add(s, dparams, grads, arguments)

    return self._switch(arguments, run, grads)

  def _switch(self, arguments: ActionArguments, run: Callable[..., Any], *args: Any) -> Any:
    """Returns `run(s, *args)` for the stage s of this tick; all of its results vary."""

    def branch(s: int, *args: Any) -> Any:
      # Branches must agree over which mesh axes their results vary.
      return vary(run(s, *args), self.context.axes)

    branches = [functools.partial(branch, s) for s in range(len(self.splits))]
    # The executor counts a packed stack's stages as its layers: this "layer" is the stage's number.
    return lax.switch(arguments.inputs(0)["layer"], branches, *args)

  def _given(self, s: int, arguments: ActionArguments) -> Leaves:
    """Leaves of stage s's parameters, own and borrowed, and of its further inputs."""
    given = stage_arguments(
      self.packed,
      s,
      rows=arguments.weights,
      chunk=arguments.first_layer,
      shared=self.shared,
      state=self.state,
      inputs=arguments.inputs(0),
    )
    return jax.tree.leaves(given)

  def _backward_arguments(
    self, s: int, slice_: Slice, arguments: ActionArguments, storage: Storage, x: Leaves, dy: Leaves
  ) -> Leaves:
    """Arguments of stage s's slice for B or I, in the order that `LayerSplit` says."""
    return [
      *self._given(s, arguments),
      *self._read(s, slice_, storage),
      *(self.boundaries.input(s, x) if self.rereads_input else []),
      *self.boundaries.cotangents(s, dy, self.context.vary, self.context.loss_scale),
    ]

  def _read(self, s: int, slice_: Slice, storage: Storage) -> Leaves:
    """The saved values that a slice of stage s reads."""
    return self.layout.arenas.read(s, slice_.reads, storage.pools, storage.cells)

  def _add(self, s: int, dparams: Leaves, grads: Tree, arguments: ActionArguments) -> Tree:
    """Adds a microbatch's gradients to stage s's row, and to the sums of what it borrows."""
    flat = self.packed.params[s]
    own, borrowed = dparams[: len(flat.leaves)], dparams[len(flat.leaves) :]
    rows = dict(grads["layers"])
    # Leaf by leaf: a row packed first and then added would be written twice.
    for leaf, offset, new in zip(flat.leaves, flat.offsets, own, strict=True):
      name, at = str(leaf.dtype), arguments.first_layer
      old = read_span(rows[name], leaf.shape, offset, at)
      rows[name] = write_span(rows[name], old + new.astype(old.dtype), offset, at)
    shared = dict(grads["shared"])
    # Leaves of a dict come in the order of its sorted keys.
    owners = [owner for _, owner in sorted(self.packed.borrowed[s].items())]
    for owner, new in zip(owners, borrowed, strict=True):
      shared[owner] = shared[owner] + new.astype(shared[owner].dtype)
    return {**grads, "layers": rows, "shared": shared}

  def _sum_state(self, s: int, aux: Leaves, pools: Pools, arguments: ActionArguments) -> Pools:
    """Adds what F has made of stage s's model state; of whole numbers, the largest is kept."""
    pools, flat = list(pools), self.packed.changing[s]
    for leaf, offset, new in zip(flat.leaves, flat.offsets, aux, strict=True):
      p = self.layout.sum_of(str(leaf.dtype))
      old = read_span(pools[p], leaf.shape, offset, arguments.first_layer)
      new = new.astype(old.dtype)
      new = old + new if is_float(leaf) else jnp.maximum(old, new)
      pools[p] = write_span(pools[p], new, offset, arguments.first_layer)
    return pools


def stage_arguments(
  packed: PackedStack,
  s: int,
  *,
  rows: Tree,
  chunk: Any,
  shared: Mapping[str, jax.Array],
  state: Mapping[str, jax.Array],
  inputs: Tree,
) -> tuple[Tree, Tree]:
  """Returns stage s's parameters, own and borrowed, and its further inputs with its model state.

  Args:
    packed: the stack, cut into stages.
    s: number of the stage.
    rows: this device's packed parameters, dtype -> [V, width].
    chunk: which of the V rows is the stage's.
    shared: leaves that several stages read, by their owner's path.
    state: this device's packed model state, dtype -> [V, width].
    inputs: further inputs as for a layer. Their entry `layer` holds the number of the stage, which
      no module may see, and is left out.
  """
  own = packed.params[s].unpack(rows, chunk)
  borrowed = {path: shared[owner] for path, owner in packed.borrowed[s].items()}
  rest = {name: value for name, value in inputs.items() if name != "layer"}
  return (own, borrowed), {**rest, "state": packed.state[s].unpack(state, chunk)}


def split_stages(
  packed: PackedStack,
  context: DeviceContext,
  rows: Tree,
  shared: Mapping[str, jax.Array],
  inputs: Tree,
  policy: Residuals | None,
  *,
  recompute: bool = False,
) -> SwitchedStages:
  """Splits every stage of a packed stack, each traced on the output of the one before.

  Args:
    packed: the stack, cut into stages.
    context: the device, as yet without the type of the travelling activation.
    rows: stand-ins of the device's packed parameters, dtype -> [V, width].
    shared: leaves that several stages read, by their owner's path.
    inputs: stand-ins of a layer's further inputs, `LayerInputs`.
    policy: what F keeps; None where only forwards run.
    recompute: whether the schedule has R.

  Raises:
    ValueError: a stage has a loop or branch that cannot be traced over a mesh, or no stage has
      anything that bears a name of the policy's.
  """
  training = policy is not None
  from_input = bool(policy and policy.stage_input)

  def all_stages(keep: Policy | None) -> tuple[list[LayerSplit], list[Flat]]:
    x: Tree = ()
    flats, splits = [Flat.of(x)], []
    for s in range(packed.depth):
      params, given = jax.eval_shape(
        functools.partial(stage_arguments, packed, s),
        rows=rows,
        chunk=jnp.int32(0),
        shared=shared,
        state=context.packed_state,
        inputs=inputs,
      )
      stage = _stage_function(packed, s, training, context.axes, not context.predicts)
      if training:
        # The forward that a backward runs again keeps all: nothing of it outlives the action.
        kept = None if from_input else keep
        splits.append(
          split(stage, params, given, x, kept, recompute=recompute, from_input=from_input)
        )
      else:
        splits.append(forward_only(stage, params, given, x))
      y, _ = jax.eval_shape(lenient(stage), params, given, x)
      x = context.zeros(y)
      flats.append(Flat.of(y))
    return splits, flats

  # All stages at once: a name that a policy asks for may be in one of them alone.
  splits, flats = policy.traced(all_stages) if policy else all_stages(None)
  # Evaluation reads running statistics and changes none.
  widths = packed.changing_widths if training else {}
  return SwitchedStages(
    packed=packed,
    context=context,
    splits=tuple(splits),
    boundaries=Boundaries.of(flats),
    layout=ArenaLayout(
      Arenas.of([one.saved if training else () for one in splits]), tuple(widths), widths
    ),
    rereads_input=from_input and not recompute,
    shared=shared,
    state=context.packed_state,
  )


def _stage_function(
  packed: PackedStack, s: int, training: bool, axes: Sequence[str], head: bool
) -> Layer:
  """Stage s as a layer to be split: `(params, inputs, x) -> y, changed state`."""

  def stage(params: Tree, inputs: Tree, x: Tree) -> tuple[Tree, Leaves]:
    rest = microbatch_inputs(inputs)
    y, after = packed.run_stage(s, params, inputs["state"], x, training, rest, head)
    # A stage may also be traced off the mesh, for the sake of loops that start from constants;
    # there nothing may vary.
    over = axes_of(jax.tree.leaves((params, inputs, x))) & {*axes}
    out: tuple[Tree, Leaves] = vary(jax.tree.map(jnp.asarray, (y, after)), over)
    return out

  return stage
