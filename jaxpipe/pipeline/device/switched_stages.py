"""Unlike stages: every stage a function of its own, behind a switch over the stage's number.

It does for a packed stack what `stage` does for layers of one kind, by the same names. A stage is
cut as a whole, as one layer: what lies between its layers is nobody else's business. All stages'
code is in the one program, and each device runs that of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.flat import Flat, read_span, widest, write_span
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.looped_stage import ActionArguments
from jaxpipe.pipeline.layer.equations import lenient
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.residuals import Policy, Residuals
from jaxpipe.pipeline.layer.slices import LayerSplit
from jaxpipe.pipeline.layer.split import Layer, forward_only, split
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.arenas import Arenas
from jaxpipe.pipeline.storage.pools import Pools, Storage
from jaxpipe.pipeline.storage.rings import Tree, wide
from jaxpipe.pipeline.table.program import Program
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class PackedEnds:
  """The ends of a packed stack: nothing goes in, and what its last stage returns is the result.

  Attributes:
    result: how the last stage's `(loss_sum, (weight, metrics))` lies in what travels.
    widths: dtype -> elements of what travels.
  """

  result: Flat
  widths: Mapping[str, int]

  def apply_embed(self, params: Tree, batch: Tree, training: bool = True) -> Tree:
    """What the first stage is given, which it does not read."""
    return {name: jnp.zeros(width, name) for name, width in self.widths.items()}

  def apply_head(self, params: Tree, x: Tree, batch: Tree, training: bool = True) -> Tree:
    """The last stage's result."""
    return self.result.unpack(x)


@dataclasses.dataclass(frozen=True, eq=False)
class SwitchedStages:
  """The actions of all stages; methods as of `stage.Stage`.

  Attributes:
    packed: the stack.
    local: the device.
    splits: slices of each stage.
    boundaries: how what stage s takes lies in what travels; one more, for the last stage's result.
    widths: dtype -> elements of what travels.
    layout: where saved values lie.
    rereads_input: whether I and B run the forward again, from the stage's input.
    shared: what stages read of one another, by its owner's path.
    state: rows of this device's stages.
  """

  packed: Any
  local: DeviceContext
  splits: tuple[LayerSplit, ...]
  boundaries: tuple[Flat, ...]
  widths: Mapping[str, int]
  layout: ArenaLayout
  rereads_input: bool
  shared: Mapping[str, jax.Array]
  state: Mapping[str, jax.Array]

  layers = 1
  sums = ("layers", "shared")
  scratch = None

  @property
  def apart(self) -> Mapping[Kind, Any]:
    """No action reads an arena that it writes."""
    return {}

  @property
  def recomputes(self) -> bool:
    """Whether R has anything to do."""
    return any(one.recompute for one in self.splits)

  def cells(self, program: Program) -> tuple[Any, tuple[int, ...]]:
    """The table of rows and the arenas' lengths; then those of the sums of what F changes."""
    table, rows = self.layout.arenas.cells(program)
    longest = (int(n) for n in rows.max(0, initial=0))
    return table, (*longest, *(self._chunks for _ in self.layout.sums))

  @property
  def _chunks(self) -> int:
    return next((len(leaf) for leaf in self.state.values()), 1)

  def allocate(self, shapes: Sequence[jax.ShapeDtypeStruct], lengths: Sequence[int]) -> Pools:
    """Arenas of undefined contents, and sums of zeros; largest whole numbers of the least."""
    local, n = self.local, len(self.layout.arenas.pools)
    made = [
      rings.allocate(shape, length, local.axes, local.poison)
      for shape, length in zip(shapes[:n], lengths[:n], strict=True)
    ]
    rest = zip(shapes[n:], lengths[n:], strict=True)
    return [*made, *(local.vary(_least(_row(shape, length))) for shape, length in rest)]

  # Actions

  def primal(self, call: ActionArguments, x: Leaves) -> Leaves:
    """Runs the stage, keeping nothing."""

    def run(s: int, x: Leaves) -> Leaves:
      out = self.splits[s].primal(*self._given(s, call), *self._take(s, x))
      return self._give(s, out[: self.splits[s].y_count])

    return self._switch(call, run, x)

  def forward(self, call: ActionArguments, x: Leaves, storage: Storage) -> tuple[Leaves, Storage]:
    """F: runs the stage, keeps what the backward pass wants, and counts its statistics."""

    def run(s: int, x: Leaves, pools: Pools) -> tuple[Leaves, Pools]:
      one = self.splits[s]
      out = one.forward(*self._given(s, call), *self._take(s, x))
      y, aux = out[: one.y_count], out[one.y_count : one.y_count + one.aux_count]
      saved = out[one.y_count + one.aux_count :]
      pools = self.layout.arenas.write(s, one.forward.makes, saved, pools, storage.cells)
      return self._give(s, y), self._count(s, aux, pools, call)

    y, pools = self._switch(call, run, x, storage.pools)
    return y, dataclasses.replace(storage, pools=pools)

  def remake(self, call: ActionArguments, x: Leaves, storage: Storage) -> Storage:
    """R, from the stage's input."""

    def run(s: int, x: Leaves, pools: Pools) -> Pools:
      again = self.splits[s].recompute
      if again is None:
        return pools
      made = again(*self._given(s, call), *self._take(s, x))
      return self.layout.arenas.write(s, again.makes, made, pools, storage.cells)

    return dataclasses.replace(storage, pools=self._switch(call, run, x, storage.pools))

  def recompute(self, call: ActionArguments, storage: Storage, made: Storage) -> Storage:
    """R, from what F kept."""

    def run(s: int, pools: Pools) -> Pools:
      again = self.splits[s].recompute
      if again is None:
        return pools
      new = again(*self._given(s, call), *self._read(s, again.reads, storage))
      return self.layout.arenas.write(s, again.makes, new, pools, made.cells)

    return dataclasses.replace(made, pools=self._switch(call, run, made.pools))

  def backward(
    self, call: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, grads: Tree
  ) -> tuple[Leaves, Tree]:
    """B: returns dx, and `grads` with this microbatch's added."""

    def run(s: int, x: Leaves, dy: Leaves, grads: Tree) -> tuple[Leaves, Tree]:
      one = self.splits[s]
      out = one.backward(
        *self._given(s, call),
        *self._read(s, one.backward.reads, storage),
        *self._input(s, x),
        *self._cotangents(s, dy),
      )
      dx, dparams = out[: one.dx_count], out[one.dx_count :]
      return self._give_back(s, dx), self._add(s, dparams, grads, call)

    return self._switch(call, run, x, dy, grads)

  def input_grad(
    self, call: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, made: Storage
  ) -> tuple[Leaves, Storage]:
    """I: returns dx, and `made` with what W waits for."""

    def run(s: int, x: Leaves, dy: Leaves, pools: Pools) -> tuple[Leaves, Pools]:
      one = self.splits[s]
      out = one.input_grad(
        *self._given(s, call),
        *self._read(s, one.input_grad.reads, storage),
        *self._input(s, x),
        *self._cotangents(s, dy),
      )
      dx, new = out[: one.dx_count], out[one.dx_count :]
      pools = self.layout.arenas.write(s, one.input_grad.makes, new, pools, made.cells)
      return self._give_back(s, dx), pools

    dx, pools = self._switch(call, run, x, dy, made.pools)
    return dx, dataclasses.replace(made, pools=pools)

  def weight_grad(self, call: ActionArguments, storage: Storage, grads: Tree) -> Tree:
    """W: returns `grads` with this microbatch's added."""

    def run(s: int, grads: Tree) -> Tree:
      slice_ = self.splits[s].weight_grad
      dparams = slice_(*self._given(s, call), *self._read(s, slice_.reads, storage))
      return self._add(s, dparams, grads, call)

    return self._switch(call, run, grads)

  def _switch(self, call: ActionArguments, run: Callable[..., Any], *args: Any) -> Any:
    """Does `run(s, *args)` of the action's stage s."""
    branches = [self._varying(functools.partial(run, s)) for s in range(len(self.splits))]
    return lax.switch(call.inputs(0)["layer"], branches, *args)

  def _varying(self, run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: vary(run(*args), self.local.axes)

  # What a stage is given, and gives

  def _given(self, s: int, call: ActionArguments) -> Leaves:
    return jax.tree.leaves(
      stage_arguments(
        self.packed, s, call.weights, call.first_layer, self.shared, self.state, call.inputs(0)
      )
    )

  def _take(self, s: int, x: Leaves) -> Leaves:
    """The stage's input, from what has arrived."""
    return self.boundaries[s].read(dict(zip(self.widths, x, strict=True)))

  def _input(self, s: int, x: Leaves) -> Leaves:
    return self._take(s, x) if self.rereads_input else []

  def _cotangents(self, s: int, dy: Leaves) -> Leaves:
    """Of the stage's float outputs; of the last stage's, the loss itself and no others count."""
    flat = self.boundaries[s + 1]
    if s + 1 == len(self.splits):
      loss, *others = flat.leaves
      rest = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in others if is_float(leaf)]
      return list(self.local.vary([jnp.ones((), loss.dtype), *rest]))
    buffers = dict(zip(self._float_widths, dy, strict=True))
    return [
      read_span(buffers[str(leaf.dtype)], leaf.shape, offset)
      for leaf, offset in zip(flat.leaves, flat.offsets, strict=True)
      if is_float(leaf)
    ]

  def _give(self, s: int, y: Leaves) -> Leaves:
    """The stage's output, as it travels."""
    return list(self.boundaries[s + 1].pack(y, self.widths).values())

  def _give_back(self, s: int, dx: Leaves) -> Leaves:
    """Cotangents of its float inputs, as they travel."""
    flat, floats = self.boundaries[s], iter(dx)
    given = [next(floats) if is_float(leaf) else None for leaf in flat.leaves]
    return list(flat.pack_leaves(given, self._float_widths).values())

  @property
  def _float_widths(self) -> dict[str, int]:
    return {n: w for n, w in self.widths.items() if jnp.issubdtype(jnp.dtype(n), jnp.inexact)}

  def _read(self, s: int, numbers: Sequence[int], storage: Storage) -> Leaves:
    return self.layout.arenas.read(s, numbers, storage.pools, storage.cells)

  def _add(self, s: int, dparams: Leaves, grads: Tree, call: ActionArguments) -> Tree:
    """Adds to the stage's row, and to the sums of what it borrows."""
    flat = self.packed.params[s]
    own, borrowed = dparams[: len(flat.leaves)], dparams[len(flat.leaves) :]
    rows = dict(grads["layers"])
    for leaf, offset, new in zip(flat.leaves, flat.offsets, own, strict=True):
      name, at = str(leaf.dtype), call.first_layer
      old = read_span(rows[name], leaf.shape, offset, at)
      rows[name] = write_span(rows[name], old + new.astype(old.dtype), offset, at)
    shared = dict(grads["shared"])
    # Leaves of a dict come in the order of its sorted keys.
    owners = [owner for _, owner in sorted(self.packed.borrowed[s].items())]
    for owner, new in zip(owners, borrowed, strict=True):
      shared[owner] = shared[owner] + new.astype(shared[owner].dtype)
    return {**grads, "layers": rows, "shared": shared}

  # Carry

  def _count(self, s: int, aux: Leaves, pools: Pools, call: ActionArguments) -> Pools:
    """Adds what F has made of the stage's state; of whole numbers, the largest is kept."""
    pools, flat, n = list(pools), self.packed.changing[s], len(self.layout.arenas.pools)
    for leaf, offset, new in zip(flat.leaves, flat.offsets, aux, strict=True):
      p = n + self.layout.sums.index(str(leaf.dtype))
      old = read_span(pools[p], leaf.shape, offset, call.first_layer)
      new = new.astype(old.dtype)
      new = old + new if is_float(leaf) else jnp.maximum(old, new)
      pools[p] = write_span(pools[p], new, offset, call.first_layer)
    return pools

  def counted(self, pools: Pools) -> dict[str, jax.Array]:
    """Dtype -> sums of what F has made of the state, [V, width]."""
    return dict(zip(self.layout.sums, pools[len(self.layout.arenas.pools) :], strict=True))

  def saved_bytes(self) -> tuple[int, int]:
    """What F keeps of one microbatch and what W waits for, at the stage where it is most."""
    arenas, each = self.layout.arenas, range(len(self.splits))
    kept = max(arenas.bytes_of(s, made=Kind.F) for s in each)
    return kept, max(arenas.bytes_of(s, last=Kind.W) for s in each)


@dataclasses.dataclass(frozen=True)
class ArenaLayout:
  """Pools of unlike stages: arenas, and behind them sums of what F makes of the state.

  Attributes:
    arenas: of saved values.
    sums: dtypes of the state that changes.
    widths: of its rows.
  """

  arenas: Arenas
  sums: tuple[str, ...]
  widths: Mapping[str, int]

  @property
  def pools(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One row of each."""
    counts = (jax.ShapeDtypeStruct((self.widths[n],), wide(jnp.dtype(n))) for n in self.sums)
    return (*self.arenas.shapes, *counts)

  def pools_of(self, kind: Kind) -> list[int]:
    """Those that an action of this kind writes to."""
    n = len(self.arenas.pools)
    counts = range(n, n + len(self.sums)) if kind is Kind.F else ()
    return [*self.arenas.pools_of(kind), *counts]


def stage_arguments(
  packed: Any,
  s: int,
  rows: Tree,
  chunk: Any,
  shared: Mapping[str, jax.Array],
  state: Mapping[str, jax.Array],
  inputs: Tree,
) -> tuple[Tree, Tree]:
  """A stage's parameters, own and borrowed, and its further inputs, its state among them."""
  own = packed.params[s].unpack(rows, chunk)
  borrowed = {path: shared[owner] for path, owner in packed.borrowed[s].items()}
  rest = {name: value for name, value in inputs.items() if name != "layer"}
  return (own, borrowed), {**rest, "state": packed.state[s].unpack(state, chunk)}


def cut_stages(
  packed: Any,
  local: DeviceContext,
  rows: Tree,
  shared: Mapping[str, jax.Array],
  inputs: Tree,
  policy: Residuals | None,
  *,
  recompute: bool = False,
) -> SwitchedStages:
  """Cuts every stage of a packed stack; arguments as of `stage.cut_stack`, but for

  Args:
    rows: parameters of the device's stages, or stand-ins.
    shared: see `Stages`.
  """
  training = policy is not None
  from_input, state = bool(policy and policy.stage_input), local.state

  def all_stages(keep: Policy | None) -> tuple[list[LayerSplit], list[Flat]]:
    x: Tree = ()
    boundaries, splits = [Flat.of(x)], []
    for s in range(packed.depth):
      params, given = jax.eval_shape(
        functools.partial(stage_arguments, packed, s), rows, jnp.int32(0), shared, state, inputs
      )
      stage = _stage_function(packed, s, training, local.axes)
      if training:
        splits.append(_cut(stage, params, given, x, recompute, from_input, keep))
      else:
        splits.append(forward_only(stage, params, given, x))
      y, _ = jax.eval_shape(lenient(stage), params, given, x)
      x = local.zeros(y)
      boundaries.append(Flat.of(y))
    return splits, boundaries

  # A name that a policy asks for may be in one stage alone.
  splits, boundaries = policy.traced(all_stages) if policy else all_stages(None)
  saved = [one.saved if training else () for one in splits]
  widths = packed.changing_widths if training else {}
  layout = ArenaLayout(Arenas.of(saved), tuple(widths), widths)
  rereads = from_input and not recompute
  travels = widest(boundaries)
  return SwitchedStages(
    *(packed, local, tuple(splits), tuple(boundaries), travels, layout, rereads, shared, state)
  )


def _stage_function(packed: Any, s: int, training: bool, axes: Sequence[str]) -> Layer:
  """LoopedStage s as `split` wants a layer."""

  def stage(params: Tree, inputs: Tree, x: Tree) -> tuple[Tree, Leaves]:
    rest = {name: value for name, value in inputs.items() if name != "state"}
    y, after = packed.run_stage(s, params, inputs["state"], x, training, rest)
    # Off the mesh, where loops that start from constants are traced, nothing may vary.
    over = axes_of(jax.tree.leaves((params, inputs, x))) & {*axes}
    out: tuple[Tree, Leaves] = vary(jax.tree.map(jnp.asarray, (y, after)), over)
    return out

  return stage


def _cut(
  stage: Layer,
  params: Tree,
  inputs: Tree,
  x: Tree,
  recompute: bool,
  from_input: bool,
  keep: Policy | None,
) -> LayerSplit:
  # The forward that a backward runs again keeps all: nothing of it outlives the action.
  keep = None if from_input else keep
  return split(stage, params, inputs, x, keep, recompute=recompute, from_input=from_input)


def _least(shape: jax.ShapeDtypeStruct) -> jax.Array:
  """What sums, or largest whole numbers, begin with."""
  start = 0 if is_float(shape) else jnp.iinfo(shape.dtype).min
  return jnp.full(shape.shape, start, shape.dtype)


def _row(shape: jax.ShapeDtypeStruct, length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((length, *shape.shape), shape.dtype)
