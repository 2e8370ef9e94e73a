"""A stack of unlike layers, as the pipeline lays it out: S rows of one width, one for each stage.

Stages that are not alike have parameters, inputs and model state of unlike shapes, and one SPMD
program wants arrays of one shape. A stage is a contiguous run of modules, the embedding before the
first stage's layers and the head behind the last's. Its parameters lie one after the other in one
row of the arrays [S, width], one array for each dtype, each row as wide as the widest stage needs:

    canonical                          packed
    {"embed": ...,                     {"embed": {},
     "layers": (run, run, ...),         "layers": {"float32": [S, width], "int32": [S, width]},
     "head": ...}                       "head": {}}

So do what a stage takes and returns, in buffers that travel between stages. To placing, replicas
and optimizers a packed stack looks like a uniform one of S layers, each with one parameter for each
dtype. Model state has rows of its own, under the further key `state`. What a stage computes is
`run_stage`; the pipeline switches between stages by their number.

Parameters that several stages read lie in their owner's row alone; see `shared_leaves`.

Letters of shapes: S stages, V stages that a device holds, `width` elements of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.flat import Flat, widest
from jaxpipe.parallel.mesh import EXPERT, SEQUENCE, STAGE, TENSOR
from jaxpipe.parallel.protocol import Cut, PlacementLike, ScheduleLike
from jaxpipe.parallel.rules import NONE, Rules
from jaxpipe.stack.context import MicrobatchInputs
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.model_state import StateRows, changing_leaves, refuse_counters, stack_rows
from jaxpipe.stack.module_spec import same_structure
from jaxpipe.stack.network import Network, keep_whole
from jaxpipe.stack.partition import modules_of_stages, stage_sizes
from jaxpipe.stack.paths import set_path
from jaxpipe.stack.protocol import ModuleTrees, PackedStack
from jaxpipe.stack.shared_leaves import SharedLeaves

Tree = Any

# The key below `layers` that only a packed tree of model state has. Rows of state and of parameters
# may have the same dtypes and widths, and `unpack` must tell which it is given.
_STATE = "state"


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
  """A stack cut into stages, each a row of parameters and a function of its own.

  Attributes:
    network: all modules, and which parameters are tied.
    given_rules: the rules of the `LayerStack`. A packed stack does not follow them; where there are
      any, they cut experts over the mesh axis `expert`, which it refuses.
    placement: which device holds which stage.
    stages: names of each stage's modules, in order: [S][...].
    params: how each stage's own parameters lie in its row, [S].
    state: how each stage's model state lies in its row, [S].
    changing: how the state that a forward changes lies in a row of its own, [S].
    uniform: False, by which the pipeline tells a packed stack from a uniform one.
  """

  network: Network
  given_rules: Rules
  placement: PlacementLike
  stages: tuple[tuple[str, ...], ...]
  params: tuple[Flat, ...]
  state: tuple[Flat, ...]
  changing: tuple[Flat, ...]

  uniform = False

  @classmethod
  def of(
    cls, network: Network, schedule: ScheduleLike, partition: Sequence[int] | None, rules: Rules
  ) -> Packed:
    """Cuts a network into the stages of a schedule.

    Args:
      network: the modules.
      schedule: says how many stages there are and where they lie.
      partition: layers of each stage, [S]; None makes them as even as can be.
      rules: those of the stack, kept as `given_rules`.

    Raises:
      StackError: the partition is for another number of stages; the schedule cuts the vocabulary,
        or its microbatches skip stages; or it holds stages twice that count in whole numbers.
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
      refuse_counters(network, schedule.name)
    sizes = stage_sizes(partition, network.depth, schedule.stages)
    stages = modules_of_stages(list(network.specs), sizes)

    def flats(trees: ModuleTrees) -> tuple[Flat, ...]:
      return tuple(Flat.of({name: trees[name] for name in stage}) for stage in stages)

    # A tied leaf of state, which never changes, lies in the row of each stage that reads it.
    state = {name: spec.state for name, spec in network.specs.items()}
    params = flats(network.param_shapes())
    _check_widths(params, "parameters")
    _check_widths(flats(state), "state")
    return cls(
      network=network,
      given_rules=rules,
      placement=schedule.placement,
      stages=stages,
      params=params,
      state=flats(state),
      changing=tuple(Flat.of(changing_leaves(network, stage, state)) for stage in stages),
    )

  def laid_out(self, schedule: ScheduleLike) -> PackedStack:
    """Itself: it lies on a schedule's devices already."""
    return self

  @property
  def depth(self) -> int:
    """Number of rows, which is the number of stages, S."""
    return len(self.stages)

  @property
  def has_state(self) -> bool:
    """Whether any module has model state, that is variables which are not trained."""
    return self.network.has_state

  @property
  def rules(self) -> Rules:
    """Rules by which nothing but `fsdp` cuts a row: none of its dims has a name.

    A mesh with `sequence` or `tensor` is refused by `check`. Both are listed as supported all the
    same: an axis that is not listed is refused earlier, by a message that knows no remedy.
    """
    return dataclasses.replace(NONE, axes=frozenset({SEQUENCE, TENSOR}), check=self._check_axes)

  def _check_axes(self, sizes: Mapping[str, int]) -> None:
    """Raises StackError for a mesh that would cut the modules' own weights."""
    # Along `expert` devices hold different rows of a microbatch, as along `data`; it is weights
    # that are cut over it only where rules say so.
    cut = [SEQUENCE, TENSOR, *([EXPERT] if self.given_rules is not NONE else [])]
    for axis in cut:
      if sizes.get(axis, 1) > 1:
        raise StackError(
          f"mesh axis {axis}:{sizes[axis]}: a stack whose layers are not alike, or that has a"
          f" partition, lies packed, and its weights are not cut over {axis}; use {axis}:1"
        )

  def tables(self, devices: int) -> frozenset[str]:
    """No table is cut over the stages: `of` refuses the schedules that would."""
    return frozenset()

  # Rows

  @functools.cached_property
  def widths(self) -> dict[str, int]:
    """Dtype -> elements of a row of parameters."""
    return widest(self.params)

  @functools.cached_property
  def state_widths(self) -> dict[str, int]:
    """Dtype -> elements of a row of model state."""
    return widest(self.state)

  @functools.cached_property
  def changing_widths(self) -> dict[str, int]:
    """Dtype -> elements of a row of the state that a forward changes."""
    return widest(self.changing)

  def param_shapes(self) -> Tree:
    """The packed parameters as `jax.ShapeDtypeStruct`s, `layers` dtype -> [S, width]."""
    return _packed_tree(self._row_shapes(self.widths), state=False)

  def state_shapes(self) -> Tree:
    """The packed state as `jax.ShapeDtypeStruct`s, `layers` `state` -> dtype -> [S, width]."""
    return _packed_tree(self._row_shapes(self.state_widths), state=True)

  def _row_shapes(self, widths: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Dtype -> shape [S, width] of the rows of all stages, for these widths."""
    return {
      dtype: jax.ShapeDtypeStruct((self.depth, width), jnp.dtype(dtype))
      for dtype, width in widths.items()
    }

  @property
  def shared_rows(self) -> Mapping[str, Sequence[int]]:
    """Nothing: what stages share lies in its owner's row, and is sent to the others."""
    return {}

  def pack(self, tree: Tree) -> Tree:
    """The packed tree of a canonical one.

    Args:
      tree: parameters, or what has their structure and shapes (gradients, moments); or state.

    Raises:
      ValueError: it has the structure of neither.
    """
    network = self.network
    # Dtypes do not tell the two apart: gradients and moments may be wider than parameters.
    state = not _alike(tree, network.join(network.param_shapes()))
    if state and not _alike(tree, network.join(network.state_shapes())):
      raise ValueError(
        f"a tree of {jax.tree.structure(tree)} is neither of parameters nor of state of this stack"
      )
    modules = network.split(tree)
    if state:
      modules = {name: network.state_of(name, modules) for name in modules}
    flats, widths = self._rows_of(state)
    rows = [
      flat.pack({name: modules[name] for name in stage}, widths)
      for stage, flat in zip(self.stages, flats, strict=True)
    ]
    return _packed_tree(stack_rows(rows), state)

  def unpack(self, tree: Tree) -> Tree:
    """The canonical tree of a packed one; inverse of `pack`."""
    state = _STATE in tree["layers"]
    rows = tree["layers"][_STATE] if state else tree["layers"]
    modules: dict[str, Tree] = {}
    # Every module stands in exactly one stage.
    for s, flat in enumerate(self._rows_of(state)[0]):
      modules |= flat.unpack(rows, s)
    if state:
      modules = {name: self.network.own_state(name, tree) for name, tree in modules.items()}
    return self.network.join(modules)

  def _rows_of(self, state: bool) -> tuple[Sequence[Flat], Mapping[str, int]]:
    """How rows of state, or of parameters, are laid out, and dtype -> how wide they are."""
    return (self.state, self.state_widths) if state else (self.params, self.widths)

  def init_layers_and_ends(
    self, key: jax.Array, layers: jax.Array, cut: Cut = keep_whole, *, state: bool = False
  ) -> Tree:
    """Fresh rows of some stages.

    Args:
      key: PRNG key; a module's values depend on it and on the module's name alone, so that they are
        the same whatever the partition.
      layers: int32 [n], numbers of the stages.
      cut: what of a row, dtype -> [width], this device keeps; applied as soon as a row is made.
      state: makes rows of model state in place of parameters.

    Returns:
      A packed tree, leaves [n, ...].
    """
    flats, widths = self._rows_of(state)

    def make(s: int, _: Any) -> Tree:
      """The row of stage s; a branch of a switch, which must take an argument."""
      network, names = self.network, self.stages[s]
      if state and network.frozen_ties:
        names = tuple({**dict.fromkeys(names), "embed": None})  # the owner of all that is tied
      made = {name: network.init_module(name, key)[state] for name in names}
      if state:
        made = {name: network.state_of(name, made) for name in self.stages[s]}
      return cut("layers", _packed_tree(flats[s].pack(made, widths), state)["layers"])

    # Which stages a device makes is known only as it runs, so that there is a branch for each.
    makers = [functools.partial(make, s) for s in range(self.depth)]
    rows = lax.map(lambda s: lax.switch(s, makers, 0), layers)
    return {"embed": {}, "layers": rows, "head": {}}

  @functools.cached_property
  def _state_rows(self) -> StateRows:
    """The layout of the rows of model state, with what a step does to them."""
    return StateRows(
      network=self.network,
      placement=self.placement,
      stages=self.stages,
      state=self.state,
      changing=self.changing,
      widths=self.state_widths,
    )

  def changing_specs(self, specs: Tree) -> list[Any]:
    """Nothing but `stage` cuts the rows of sums."""
    return [Spec(STAGE, None) for _ in self.changing_widths]

  def renewed(self, rows: Tree, counted: Sequence[jax.Array], vary: Callable[[Tree], Tree]) -> Tree:
    """Replaces the changing leaves by the step's averages; all others stay bit for bit.

    It runs inside `shard_map`.

    Args:
      rows: `state` -> dtype -> [owned, width] before the step, of the stages that this device owns.
      counted: for each dtype [owned, width], the changing leaves as the step has made them: of
        floats the mean over microbatches and data shards, of whole numbers the largest.
      vary: marks a tree as differing between stages.

    Returns:
      The rows after the step, `state` -> dtype -> [owned, width].
    """
    by_dtype = dict(zip(self.changing_widths, counted, strict=True))
    return {_STATE: self._state_rows.renewed(rows[_STATE], by_dtype, vary)}

  # Leaves that several stages read

  @functools.cached_property
  def _shared_leaves(self) -> SharedLeaves:
    """The parameters that several stages read, with how they reach every device."""
    return SharedLeaves(self.network, self.placement, self.stages, self.params)

  @property
  def borrowed(self) -> tuple[dict[str, str], ...]:
    """For each stage, the parameters it reads that another stage owns: path -> owner's path."""
    return self._shared_leaves.borrowed

  def shared(self, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """All leaves that some stage borrows, on every device: owner's path -> leaf.

    Args:
      rows: dtype -> [V, width], the parameters of this device's stages; inside `shard_map`.
    """
    return self._shared_leaves.send(rows)

  def head_params(self, params: Tree) -> Tree:
    """The part `head` as it is: empty, for the head's parameters lie in the last stage's row."""
    return params["head"]

  def untie(self, grads: Tree) -> Tree:
    """Adds the gradients of `grads["shared"]` to the owners' rows, and takes them out."""
    return self._shared_leaves.collect(grads)

  # The function of a stage

  def run_stage(
    self,
    s: int,
    params: tuple[ModuleTrees, Mapping[str, jax.Array]],
    state: ModuleTrees,
    x: Tree,
    training: bool,
    inputs: MicrobatchInputs,
    head: bool = True,
  ) -> tuple[Tree, list[jax.Array]]:
    """Runs a stage's modules one after the other.

    A parameter is put where it is read in two steps: what other stages own, once for the stage [1];
    what a module of this stage owns, just before each call [2]. The state after the calls is
    narrowed to what may have changed [3].

    Args:
      s: number of the stage.
      params: its modules' own parameters; and what it borrows, by the paths of `borrowed[s]`.
      state: its modules' model state.
      x: what the stage before returned; the first stage does not read it.
      training: False in evaluation.
      inputs: of the microbatch.
      head: False leaves out the head, so that the last stage returns what the last layer does.

    Returns:
      What the stage returns: x for the next; of the last, `(loss_sum, (weight, metrics))`. And the
      leaves of its state that a forward changes, after the call.
    """
    own, borrowed = params
    trees = dict(own)
    for path, leaf in borrowed.items():  # [1]
      name = next(name for name in self.stages[s] if path.startswith(f"{name}/"))
      trees[name] = set_path(trees[name], path.removeprefix(f"{name}/"), leaf)
    after: dict[str, Tree] = {}
    for name in self.stages[s]:
      if name == "head" and not head:
        after[name] = state[name]
        continue
      # [2] A leaf that several modules of a stage read is one argument of this function, so that
      # differentiating it adds up all their gradients.
      all_read = self._shared_leaves.with_neighbours(s, name, trees)
      x, after[name] = self.network.call(name, all_read, state[name], x, training, inputs)
    return x, changing_leaves(self.network, self.stages[s], after)  # [3]


def _check_widths(flats: Sequence[Flat], what: str) -> None:
  """Refuses a row that slices could not address: their offsets are int32.

  Raises:
    StackError: names the stage and its elements.
  """
  for s, flat in enumerate(flats):
    for dtype, width in flat.widths.items():
      if width > np.iinfo(np.int32).max:
        raise StackError(
          f"stage {s} has {width:,} elements of {dtype} {what}, and a packed row holds at most"
          f" {np.iinfo(np.int32).max:,}; give it fewer layers (partition=), or take more stages"
        )


def _packed_tree(rows: Tree, state: bool) -> Tree:
  """Rows, dtype -> [..., width], in the place that they have in a packed tree."""
  return {"embed": {}, "layers": {_STATE: rows} if state else rows, "head": {}}


def _alike(a: Tree, b: Tree) -> bool:
  """Whether both have the same structure and shapes, whatever their dtypes."""
  if not same_structure(a, b):
    return False
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(x.shape == y.shape for x, y in pairs)


if TYPE_CHECKING:

  def _satisfies_its_protocol(stack: Packed) -> PackedStack:
    return stack
