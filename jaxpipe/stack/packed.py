"""A stack of unlike layers, as the pipeline lays it out: S rows of one width, one for each stage.

A stage is a contiguous run of modules, the embedding before the first stage's layers and the head
behind the last's. Its parameters lie flat in one row of the arrays [S, width], one array for each
dtype; so do what it takes and returns in buffers that travel between stages. To placing, replicas
and optimizers a packed stack looks like a uniform one of S layers, each with one parameter for each
dtype. What a stage computes is `run_stage`; the pipeline switches between stages.

Weights that several stages read lie in their owner's row alone: `shared` sends them to all devices
before a step, `collect` adds their gradients to the owner's after it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel import axes
from jaxpipe.parallel.flat import Flat, read_span, widest, write_span
from jaxpipe.parallel.mesh import EXPERT, SEQUENCE, STAGE, TENSOR
from jaxpipe.parallel.replicas import owned
from jaxpipe.parallel.rules import NONE, Rules
from jaxpipe.stack.module_spec import StackError, same_structure
from jaxpipe.stack.network import get_owned
from jaxpipe.stack.paths import set_path

Tree = Any
# For each module of a stage, by name, a tree.
ModuleTrees = Mapping[str, Tree]

# Beneath which rows of state lie, so that a packed state is not taken for packed parameters.
_STATE = "state"


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
  """A stack cut into stages.

  Attributes:
    stack: the `LayerStack`.
    placement: which device holds which stage.
    stages: names of the modules of each.
    params: how each stage's own parameters lie in its row.
    state: how its state does.
    changing: how what a forward changes of its state does, in a row of its own.
  """

  stack: Any
  placement: Any
  stages: tuple[tuple[str, ...], ...]
  params: tuple[Flat, ...]
  state: tuple[Flat, ...]
  changing: tuple[Flat, ...]

  uniform = False

  @property
  def rules(self) -> Rules:
    """None, but that a mesh over whose other axes the modules might share work is refused."""
    return dataclasses.replace(NONE, axes=frozenset({SEQUENCE, TENSOR}), check=self._check_axes)

  def _check_axes(self, sizes: Mapping[str, int]) -> None:
    cut = [SEQUENCE, TENSOR, *([EXPERT] if self.stack.rules is not NONE else [])]
    for axis in cut:
      if sizes.get(axis, 1) > 1:
        raise StackError(
          f"mesh axis {axis}:{sizes[axis]}: a stack whose layers are not alike, or that has a"
          f" partition, lies packed, and its weights are not cut over {axis}; use {axis}:1"
        )

  @classmethod
  def of(cls, stack: Any, schedule: Any) -> Packed:
    """Cuts a stack as its partition says.

    Raises:
      StackError: it is for another number of stages, or the schedule's microbatches pass other
        paths or meet over the vocabulary.
    """
    if schedule.paths is not None:
      raise StackError(
        f"schedule {schedule.name} lets microbatches skip stages, which only layers of one kind"
        " that return what they take can be; take another schedule"
      )
    if schedule.vocabulary:
      raise StackError(
        f"schedule {schedule.name} cuts the vocabulary over the stages, which is for stacks of"
        " uniform layers; take a schedule whose last stage has the head (head='last')"
      )
    if schedule.placement.replicated:
      _check_replicated(stack, schedule.name)
    sizes = stage_sizes(stack, schedule.stages)
    names, ends = list(stack.network.specs), [0, *_cumulative(sizes)]
    layers = names[1:-1]
    stages = [layers[a:b] for a, b in itertools.pairwise(ends)]
    stages[0] = [names[0], *stages[0]]
    stages[-1] = [*stages[-1], names[-1]]
    of = lambda trees: tuple(Flat.of({p: trees[p] for p in stage}) for stage in stages)  # noqa: E731
    state = stack.network.state_shapes()
    return cls(
      stack,
      schedule.placement,
      tuple(map(tuple, stages)),
      of(stack.network.param_shapes()),
      of(state),
      tuple(Flat.of(_changing(stack, stage, state)) for stage in stages),
    )

  def laid_out(self, schedule: Any) -> Packed:
    """Itself."""
    return self

  @property
  def depth(self) -> int:
    """Rows: the number of stages."""
    return len(self.stages)

  @property
  def has_state(self) -> bool:
    """Whether any module holds variables that are not trained."""
    return bool(self.stack.has_state)

  # Rows

  @functools.cached_property
  def widths(self) -> dict[str, int]:
    """Dtype -> elements of a row of parameters."""
    return widest(self.params)

  @functools.cached_property
  def state_widths(self) -> dict[str, int]:
    """Dtype -> elements of a row of the state."""
    return widest(self.state)

  @functools.cached_property
  def changing_widths(self) -> dict[str, int]:
    """Dtype -> elements of a row of what changes of the state."""
    return widest(self.changing)

  def param_shapes(self) -> Tree:
    """The packed tree as `jax.ShapeDtypeStruct`s."""
    return _tree(self._rows(self.widths), state=False)

  def state_shapes(self) -> Tree:
    """The packed state as `jax.ShapeDtypeStruct`s."""
    return _tree(self._rows(self.state_widths), state=True)

  def _rows(self, widths: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    return {n: jax.ShapeDtypeStruct((self.depth, w), jnp.dtype(n)) for n, w in widths.items()}

  def pack(self, tree: Tree) -> Tree:
    """The packed tree of a canonical one: of parameters, their gradients or moments, or of state.

    Raises:
      ValueError: it has the structure of neither.
    """
    state = not _alike(tree, self.stack.param_shapes())
    if state and not _alike(tree, self.stack.state_shapes()):
      raise ValueError(
        f"a tree of {jax.tree.structure(tree)} is neither of parameters nor of state of this stack"
      )
    modules = self.stack.network.split(tree)
    flats, widths = self._layout(state)
    rows = [
      flat.pack({name: modules[name] for name in stage}, widths)
      for stage, flat in zip(self.stages, flats, strict=True)
    ]
    return _tree(_stack_rows(rows), state)

  def unpack(self, tree: Tree) -> Tree:
    """Inverse of `pack`."""
    state = _STATE in tree["layers"]
    rows = tree["layers"][_STATE] if state else tree["layers"]
    modules: dict[str, Tree] = {}
    for s, flat in enumerate(self._layout(state)[0]):
      modules |= flat.unpack(rows, s)
    canonical: Tree = self.stack.network.join(modules)
    return canonical

  def _layout(self, state: bool) -> tuple[Sequence[Flat], Mapping[str, int]]:
    return (self.state, self.state_widths) if state else (self.params, self.widths)

  def init_layers_and_ends(
    self,
    key: jax.Array,
    layers: jax.Array,
    cut: Callable[[str, Tree], Tree] = lambda part, tree: tree,
    *,
    state: bool = False,
  ) -> Tree:
    """Rows of the stages numbered in `layers` (int32 [n]); see `LayerStack`."""
    flats, widths = self._layout(state)

    def one(s: int) -> Tree:
      made = {
        module: self.stack.network.init_module(module, key)[state] for module in self.stages[s]
      }
      return cut("layers", _tree(flats[s].pack(made, widths), state)["layers"])

    makers = [functools.partial(lambda s, _: one(s), s) for s in range(self.depth)]
    rows = lax.map(lambda s: lax.switch(s, makers, 0), layers)
    return {"embed": {}, "layers": rows, "head": {}}

  # What the executor asks of any stack

  def tables(self, devices: int) -> frozenset[str]:
    """None are cut: `of` refuses schedules that would."""
    return frozenset()

  def head_params(self, ends: Tree) -> Tree:
    """The head's: none, they lie in the last stage's row."""
    return ends["head"]

  def untie(self, grads: Tree) -> Tree:
    """Gradients of the rows alone; see `collect`."""
    return self.collect(grads)

  # Stages

  @functools.cached_property
  def borrowed(self) -> tuple[dict[str, str], ...]:
    """For each stage, what its modules read of other stages: path -> the owner's path."""
    out = []
    for stage in self.stages:
      mine: dict[str, str] = {}
      for module in stage:
        for path, owner in self.stack.network.owners(module).items():
          if not any(owner.startswith(f"{p}/") for p in stage):
            mine[f"{module}/{path}"] = owner
      out.append(mine)
    return tuple(out)

  @functools.cached_property
  def shared_paths(self) -> tuple[str, ...]:
    """Paths of the leaves that several stages read, as their owners call them."""
    return tuple(sorted({owner for mine in self.borrowed for owner in mine.values()}))

  def _home(self, path: str) -> tuple[int, int, jax.ShapeDtypeStruct]:
    """Owner's stage of a shared leaf, its place in the row, its shape."""
    for s, (stage, flat) in enumerate(zip(self.stages, self.params, strict=True)):
      if any(path.startswith(f"{module}/") for module in stage):
        numbers = jax.tree.unflatten(flat.structure, range(len(flat.leaves)))
        n = get_owned(numbers, path)
        return s, flat.offsets[n], flat.leaves[n]
    raise AssertionError(path)

  def _held(self, stage: int) -> tuple[jax.Array, jax.Array]:
    """Whether this device is the first that holds a stage, and as which chunk."""
    d, v = next(
      (d, v)
      for v in range(self.placement.chunks)
      for d in range(self.placement.devices)
      if self.placement.stage(d, v) == stage
    )
    return lax.axis_index(STAGE) == d, jnp.int32(v)

  def shared(self, rows: Tree) -> dict[str, jax.Array]:
    """The leaves that several stages read, from the rows [V, width] of all devices."""
    out = {}
    for path in self.shared_paths:
      s, offset, leaf = self._home(path)
      here, chunk = self._held(s)
      mine = read_span(rows[str(leaf.dtype)], leaf.shape, offset, chunk)
      out[path] = axes.total(jnp.where(here, mine, 0), STAGE)
    return out

  def collect(self, grads: Tree) -> Tree:
    """Transpose of `shared`: their gradients added to the owner's row; takes them out."""
    rows = dict(grads["layers"])
    for path, grad in grads["shared"].items():
      s, offset, leaf = self._home(path)
      here, chunk = self._held(s)
      name = str(leaf.dtype)
      whole = jnp.where(here, axes.total(grad, STAGE), 0)
      old = read_span(rows[name], leaf.shape, offset, chunk)
      rows[name] = write_span(rows[name], old + whole, offset, chunk)
    return {**{k: v for k, v in grads.items() if k != "shared"}, "layers": rows}

  def renewed(
    self, rows: Tree, counted: Mapping[str, jax.Array], vary: Callable[[Tree], Tree]
  ) -> Tree:
    """Rows of the state after a step.

    Args:
      rows: dtype -> [n, width] before it, of the stages that this device owns.
      counted: dtype -> [n, width], what the step has made of what changes.
      vary: marks a tree as differing between stages.
    """

    def write(s: int, row: Tree, new: Tree) -> Tree:
      leaves = self.state[s].read(row)
      fresh = iter(self.changing[s].read(new))
      changes = jax.tree.leaves({p: self.stack.network.specs[p].changing for p in self.stages[s]})
      kept = [next(fresh) if yes else leaf for leaf, yes in zip(leaves, changes, strict=True)]
      kept = [a.astype(leaf.dtype) for a, leaf in zip(kept, leaves, strict=True)]
      return vary(self.state[s].pack_leaves(kept, self.state_widths))

    here = lax.axis_index(STAGE)
    stages = jnp.asarray(owned(self.placement), jnp.int32)[here]
    branches = [functools.partial(write, s) for s in range(self.depth)]
    made = [
      lax.switch(
        stages[j],
        branches,
        {name: leaf[j] for name, leaf in rows[_STATE].items()},
        {name: leaf[j] for name, leaf in counted.items()},
      )
      for j in range(stages.shape[0])
    ]
    return {_STATE: _stack_rows(made)}

  def run_stage(
    self,
    s: int,
    params: tuple[ModuleTrees, Tree],
    state: ModuleTrees,
    x: Tree,
    training: bool,
    inputs: Tree,
  ) -> tuple[Tree, list[jax.Array]]:
    """A stage's function.

    Args:
      s: its number.
      params: its modules' own, and what it borrows, by its own paths.
      state: its modules'.
      x: what the stage before returned; of the first stage, nothing.
      training, inputs: see `Network.call`.

    Returns:
      What the stage returns: x for the next; of the last, `(loss_sum, (weight, metrics))`. And the
      leaves of its state that change, after the call.
    """
    own, borrowed = params
    trees = dict(own)
    for path, leaf in borrowed.items():
      module = next(p for p in self.stages[s] if path.startswith(f"{p}/"))
      trees[module] = set_path(trees[module], path.removeprefix(f"{module}/"), leaf)
    after: dict[str, Tree] = {}
    for module in self.stages[s]:
      mine = self._with_neighbours(module, trees)
      x, after[module] = self.stack.network.call(module, mine, state[module], x, training, inputs)
    return x, _changing(self.stack, self.stages[s], after)

  def _with_neighbours(self, module: str, trees: ModuleTrees) -> Tree:
    """A module's parameters with those that a module of the same stage owns."""
    params = trees[module]
    for path, owner in self.stack.network.owners(module).items():
      if any(owner.startswith(f"{p}/") for p in trees):
        params = set_path(params, path, get_owned(trees, owner))
    return params


def _check_replicated(stack: Any, schedule: str) -> None:
  """Two homes of a stage see a half of the microbatches each, and their statistics are added."""
  for spec in stack.network.specs.values():
    pairs = zip(jax.tree.leaves(spec.state), jax.tree.leaves(spec.changing), strict=True)
    if any(yes and not jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf, yes in pairs):
      raise StackError(
        f"{spec.name} counts in whole numbers, and schedule {schedule} holds every stage twice;"
        " make the counter a float, or take another schedule"
      )


def stage_sizes(stack: Any, stages: int) -> tuple[int, ...]:
  """How many layers each stage has.

  Raises:
    StackError: the stack's partition is for another number of stages.
  """
  if stack.partition is None:
    least, more = divmod(stack.depth, stages)
    return tuple(least + (s < more) for s in range(stages))
  if len(stack.partition) != stages:
    raise StackError(
      f"partition {list(stack.partition)} is for {len(stack.partition)} stages and the schedule has"
      f" {stages}; give {stages} numbers that add up to {stack.depth}"
    )
  return tuple(stack.partition)


def _tree(rows: Tree, state: bool) -> Tree:
  return {"embed": {}, "layers": {_STATE: rows} if state else rows, "head": {}}


def _alike(a: Tree, b: Tree) -> bool:
  """Whether both have the same structure and shapes."""
  shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]  # noqa: E731
  return same_structure(a, b) and shapes(a) == shapes(b)


def _cumulative(sizes: Sequence[int]) -> list[int]:
  return [sum(sizes[: s + 1]) for s in range(len(sizes))]


def _changing(stack: Any, stage: Sequence[str], trees: ModuleTrees) -> list[Any]:
  """Leaves of the modules' state that a forward changes, in the order of the stage's state."""
  changes = {module: stack.network.specs[module].changing for module in stage}
  leaves = jax.tree.leaves({module: trees[module] for module in stage})
  return [leaf for leaf, yes in zip(leaves, jax.tree.leaves(changes), strict=True) if yes]


def _stack_rows(rows: Sequence[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
  """Rows of one dtype need not be of one: an optimizer's moments are wider than its parameters."""
  return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
