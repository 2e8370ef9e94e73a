"""A network as the pipeline sees it: an embedding, a stack of layers and a head, all built lazily.

The modules are given as *factories*, `rngs -> nnx.Module`: nothing is allocated until it is known
on which device it will live. The stack turns them into pure functions of one parameter tree, which
is all that the executor and the unpipelined reference ever see; neither knows a Flax module.

    embed(batch)      -> x                            any pytree, leaves [rows, ...]
    layer(x, context) -> x                            any pytree
    head(x, batch)    -> (loss_sum, weight, metrics)  sums over the rows, never means

Layers of one kind that return what they take are *uniform*: they lie stacked, and the pipeline
loops over them. All other stacks lie packed, each stage as one row; see `packed`. What the executor
asks of both is written down in `protocol`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.mesh import FSDP
from jaxpipe.parallel.placing import Tree, init_placed, place
from jaxpipe.parallel.protocol import Cut, ScheduleLike
from jaxpipe.parallel.rules import NONE, Rules, axes_of_entry
from jaxpipe.stack.context import Context, LayerInputs, check_key, check_leaves
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.from_modules import factories_of
from jaxpipe.stack.model_state import refuse_counters
from jaxpipe.stack.module.parts import Factory
from jaxpipe.stack.module_spec import ModuleSpec, sums
from jaxpipe.stack.network import Network, keep_whole
from jaxpipe.stack.packed import Packed
from jaxpipe.stack.partition import checked_partition
from jaxpipe.stack.paths import get_path, set_path, without
from jaxpipe.stack.protocol import HeadSums, PackedStack, UniformStack
from jaxpipe.stack.vocabulary import Tables, VocabularyEnds


# eq=False: a stack is hashed by identity, so that it can be a static argument of a jitted function.
@dataclasses.dataclass(frozen=True, eq=False)
class LayerStack:
  """A network of L = `len(layers)` layers between an embedding and a head.

  Attributes:
    embed: factory of a module `batch -> x`.
    layers: factories of modules `(x, context) -> x`; each may start its own layer from other
      values, and need not be like the one before.
    head: factory of a module `(x, batch) -> (loss_sum, weight, metrics)`.
    tied: parameters that are another module's own: path -> the owner's path, each `/`-joined, such
      as `{"head/table": "embed/table"}` or `{"layers/1/base": "layers/0/base"}`, of a leaf or of
      all leaves below. The copy does not exist in the tree. What is not trained can be tied between
      head and embedding alone.
    vocabulary: where the tables over the vocabulary are, for schedules that cut them over the
      stages; None where both ends stay whole.
    rules: how parameters lie over `tensor` and `expert`, and over which axes the modules share
      their work; by default over none. `fsdp` needs no rules.
    partition: how many layers each stage has, first to last; by default as even as can be. The
      embedding stands before the first stage's layers, the head behind the last's.
    trainable: NNX filter of the variables that are parameters; all others are model state. The
      first element of the paths it sees is the module's place: `("layers/3", "inner", "kernel")`.
    example_batch: a batch or its shapes, by which layers are compared by what they compute: those
      that differ only in attributes, such as a number of their own, are then of one kind.
    network: the modules as data, and their parameters' canonical tree; made of the above.

  Raises:
    StackError: no layers, random streams, tied shapes that differ, a partition that does not fit,
      or tables that do not exist.
  """

  embed: Factory
  layers: Sequence[Factory]
  head: Factory
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  vocabulary: Tables | None = None
  rules: Rules = NONE
  partition: Sequence[int] | None = None
  trainable: Any = nnx.Param
  example_batch: Tree = dataclasses.field(default=None, repr=False)
  network: Network = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    object.__setattr__(self, "layers", tuple(self.layers))
    if not self.layers:
      raise StackError("a stack needs at least one layer; got layers=[]")
    # Tracing refuses modules that cannot be pipelined, while the stack is built.
    network = Network.trace(
      self.embed, self.layers, self.head, self.tied, self.trainable, self.example_batch
    )
    object.__setattr__(self, "network", network)
    if self.partition is not None:
      object.__setattr__(self, "partition", checked_partition(self.partition, self.depth))
    if self.vocabulary is not None:
      self.vocabulary_ends.check_tables()

  @classmethod
  def from_modules(
    cls,
    modules: Sequence[Any],
    *,
    loss: Callable[[Tree, Tree], Any],
    batch: Tree,
    inputs: str | Callable[[Tree], Tree] = "x",
    trainable: Any = nnx.Param,
    **options: Any,
  ) -> LayerStack:
    """A stack of modules in a row, each called with what the one before returned.

    Args:
      modules: each a layer: an NNX class or factory with a parameter `rngs`, such as
        `functools.partial(nnx.Linear, 8, 16)`; an NNX module, whose values are where `init` starts,
        and whose variables are tied where several modules hold them; a Linen module, whose shapes
        are inferred, or which is bound to its values; a function of x; or a `jaxpipe.layer` of any
        of these. A module that has a parameter `context` is given the layer's `Context`, and one
        with a mode flag, such as `train` or `deterministic`, is told whether it trains.
      loss: `loss(y, batch)`, where y is what the last module returns: a loss for every row (or for
        every token of every row), or `(loss_sum, weight, metrics)`.
      batch: an example batch or its shapes, leaves `[B, ...]`.
      inputs: which entry of the batch goes into the first module, or a function of the batch.
      trainable, options: as for `LayerStack`.

    Raises:
      StackError: a module that cannot take what the one before returns, by number and class; a loss
        without rows; and as for `LayerStack`.

    Example:
      >>> import functools, jax.numpy as jnp, optax
      >>> batch = {"x": jnp.ones((8, 4)), "label": jnp.zeros(8, jnp.int32)}
      >>> stack = LayerStack.from_modules(
      ...   [functools.partial(nnx.Linear, 4, 16), nnx.relu, functools.partial(nnx.Linear, 16, 3)],
      ...   loss=lambda y, batch: optax.softmax_cross_entropy_with_integer_labels(
      ...     y, batch["label"]
      ...   ),
      ...   batch=batch,
      ... )
      >>> stack.depth, stack.uniform
      (3, False)
    """
    if not modules:
      raise StackError("a stack needs at least one layer; got modules=[]")
    embed, layers, head = factories_of(modules, loss, batch, inputs)
    return cls(embed, layers, head, trainable=trainable, example_batch=batch, **options)

  # How it lies on devices

  @property
  def depth(self) -> int:
    """Number of layers, L."""
    return len(self.layers)

  @property
  def uniform(self) -> bool:
    """Whether the layers are of one kind and lie stacked, so that stages can loop over them.

    A stack with a partition lies packed even if its layers are alike, and so does one with
    statistics in its embedding or head, or with ties between layers that are no repetition (see
    `shared_rows`). Frozen variables and statistics of layers are stacked as parameters are.
    """
    specs = self.network.specs
    if any(jax.tree.leaves((specs["embed"].changing, specs["head"].changing))):
      return False
    ties_of_ends_only = len(self._head_ties) == len(self.network.ties)
    ties_fit = ties_of_ends_only or bool(self.network.shared.owners)
    one_kind = len(self.network.runs) == 1
    return one_kind and ties_fit and self.partition is None

  @functools.cached_property
  def shared_rows(self) -> Mapping[str, Sequence[int]]:
    """Path of a leaf that layers share, such as `layers/kernel` -> the row that each reads, [L]."""
    rows = self.network.shared.rows() if self.uniform else {}
    return {f"layers/{path}": each for path, each in rows.items()}

  @property
  def has_state(self) -> bool:
    """Whether any module has model state, that is variables which are not trained."""
    return self.network.has_state

  def laid_out(self, schedule: ScheduleLike) -> UniformStack | PackedStack:
    """The stack as it lies on the devices of a schedule: itself where it is uniform, or packed.

    Raises:
      StackError: a partition into another number of stages, or a schedule that a packed stack
        cannot follow.
    """
    if self.uniform:
      self._check_statistics(schedule)
      return self
    return Packed.of(self.network, schedule, self.partition, self.rules)

  def _check_statistics(self, schedule: ScheduleLike) -> None:
    """Refuses a schedule under which statistics of layers would not be means over microbatches.

    Raises:
      StackError: microbatches skip stages, or each of two homes of a stage counts whole numbers.
    """
    if not any(jax.tree.leaves(self._layer.changing)):
      return
    if schedule.paths is not None:
      raise StackError(
        f"schedule {schedule.name} lets microbatches skip stages, whose statistics would be of some"
        " microbatches only; take another schedule"
      )
    if schedule.placement.replicated:
      refuse_counters(self.network, schedule.name)

  def pack(self, tree: Tree) -> Tree:
    """Returns the canonical tree itself, which is what a uniform stack places.

    It does so also of a stack that is not uniform, which only `laid_out(...)` packs.
    """
    return tree

  def unpack(self, tree: Tree) -> Tree:
    """Returns the tree itself: the inverse of `pack`."""
    return tree

  def param_shapes(self) -> Tree:
    """The canonical tree of the parameters as `jax.ShapeDtypeStruct`s."""
    return self.network.join(self.network.param_shapes())

  def state_shapes(self) -> Tree:
    """The canonical tree of the model state as `jax.ShapeDtypeStruct`s."""
    return self.network.join(self.network.state_shapes())

  def changing(self) -> Tree:
    """The canonical tree of the model state, True for what a forward in training changes."""
    network = self.network
    each = {name: network.own_state(name, spec.changing) for name, spec in network.specs.items()}
    # Of a run, whose leaves are stacked, the first layer speaks for all.
    runs = tuple(each[f"layers/{run.start}"] for run in network.runs)
    layers = runs[0] if len(runs) == 1 else runs
    return {"embed": each["embed"], "layers": layers, "head": each["head"]}

  # Fresh values

  def init(
    self,
    key: jax.Array,
    example_batch: Tree,
    schedule: ScheduleLike | None = None,
    mesh: Mesh | None = None,
  ) -> Tree:
    """Returns fresh parameters: the canonical tree, or the same values placed over a mesh.

    Args:
      key: PRNG key; layer i's values depend on it and on i alone. Modules that were given as
        objects start from their own values.
      example_batch: a batch, or its `jax.ShapeDtypeStruct`s; only shapes are read, to check that
        every layer returns what it takes.
      schedule: with `mesh`, says which device holds which layers. Each device then creates its own
        layers only: the whole tree is never in one place.
      mesh: mesh with a `stage` axis.

    Returns:
      `{"embed": ..., "layers": ..., "head": ...}`, `layers` with a leading layer dim.

    Raises:
      StackError: only one of schedule and mesh, or a module that cannot take what it is given.
    """
    if (schedule is None) != (mesh is None):
      raise StackError("init takes a schedule and a mesh, or neither; only one was given")
    check_key(key)
    self.check_shapes(example_batch)
    if self.network.given():
      return self._placed(self.network.init_from_given(key)[0], schedule, mesh)
    if schedule is not None and mesh is not None:
      return init_placed(self.laid_out(schedule), key, schedule, mesh)
    # A loop compiles one layer for all. Without it each layer has code of its own, which layers
    # that are not alike need.
    if self.uniform:
      return jax.jit(self.init_layers_and_ends)(key, jnp.arange(self.depth))
    return jax.jit(lambda key: self.network.init(key)[0])(key)

  def init_state(
    self,
    key: jax.Array,
    example_batch: Tree,
    schedule: ScheduleLike | None = None,
    mesh: Mesh | None = None,
  ) -> Tree:
    """Returns the model state that goes with `init` of the same key: statistics, frozen weights.

    Args:
      key, example_batch, schedule, mesh: see `init`.

    Returns:
      `{"embed": ..., "layers": ..., "head": ...}`, an empty dict for a module without state; `{}`
      where it is placed and no module has any.

    Raises:
      StackError: see `init`.
    """
    if (schedule is None) != (mesh is None):
      raise StackError("init_state takes a schedule and a mesh, or neither; only one was given")
    check_key(key)
    self.check_shapes(example_batch)
    if self.network.given() and self.has_state:
      return self._placed(self.network.init_from_given(key)[1], schedule, mesh)
    if schedule is not None and mesh is not None:
      laid = self.laid_out(schedule)
      return init_placed(laid, key, schedule, mesh, state=True) if self.has_state else {}
    return jax.jit(lambda key: self.network.init(key)[1])(key)

  def _placed(self, tree: Tree, schedule: ScheduleLike | None, mesh: Mesh | None) -> Tree:
    """A canonical tree of values on the host as arrays of JAX, placed where a mesh is given."""
    if schedule is None or mesh is None:
      return jax.tree.map(jnp.asarray, tree)
    return place(tree, self, schedule, mesh)

  def init_layers_and_ends(
    self, key: jax.Array, layers: jax.Array, cut: Cut = keep_whole, *, state: bool = False
  ) -> Tree:
    """Fresh parameters of some layers of a uniform stack, and of both ends.

    Args:
      key: PRNG key, as for `init`.
      layers: int32 [n], numbers of the layers.
      cut: what of a layer (leaves without a layer dim) or of an end this device keeps; applied as
        soon as it is made.
      state: makes the model state in place of the parameters.

    Returns:
      `{"embed": ..., "layers": ..., "head": ...}`, leaves of `layers` [n, ...], of those that
      layers share all rows.
    """
    return {
      "embed": cut("embed", self.network.init_module("embed", key)[state]),
      "layers": self.network.init_layers(key, layers, cut, state=state),
      "head": cut("head", self.network.init_module("head", key)[state]),
    }

  def check_shapes(self, batch: Tree) -> Tree:
    """Traces all modules on a batch, arrays or shapes; returns the shapes of the first layer's x.

    Raises:
      StackError: a module that cannot take what the one before returns; or, where the stack is
        uniform, a layer whose output is unlike its input.
    """
    check_leaves(batch)
    return self.network.check_shapes(batch, self.uniform)

  # The functions of a uniform stack

  def apply_embed(
    self, params: Tree, batch: Tree, training: bool = True, state: Tree | None = None
  ) -> Tree:
    """Embeds a batch: `embed(batch) -> x`.

    Args:
      params: the embedding's own, the part `embed`.
      batch: leaves [rows, ...].
      training: False in evaluation.
      state: its frozen variables; None where it has none.
    """
    return self.network.specs["embed"].run(params, state or {}, training, batch)[0]

  def apply_layer(self, params: Tree, x: Tree, training: bool, inputs: LayerInputs) -> Tree:
    """Runs one layer: `layer(x, context) -> x`.

    Args:
      params: the layer's, leaves without a layer dim.
      x: leaves [rows, ...].
      training: False in evaluation, where dropout is the identity.
      inputs: of this layer and microbatch.
    """
    return self.run_layer(params, x, training, inputs)[0]

  def run_layer(
    self, params: Tree, x: Tree, training: bool, inputs: LayerInputs
  ) -> tuple[Tree, list[Any]]:
    """Runs one layer as `apply_layer`; returns also what the call makes of its statistics.

    Returns:
      x, and the leaves of the layer's state that a forward in training changes; none in evaluation.
    """
    state = inputs.get("state") or {}
    context = Context.create(training, **inputs)
    x, after = self._layer.run(params, state, training, x, context=context)
    return x, self._changing_leaves(after) if training else []

  def _changing_leaves(self, state: Tree) -> list[Any]:
    """Leaves of a layer's state, or of the layers', that a forward changes."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(self._layer.changing), strict=True)
    return [leaf for leaf, changes in pairs if changes]

  def apply_head(
    self, params: Tree, x: Tree, batch: Tree, training: bool = True, state: Tree | None = None
  ) -> HeadSums:
    """Runs the head; returns its sums as `value_and_grad(has_aux=True)` wants them.

    Args:
      params: all that the head reads, `head_params(...)`.
      x: output of the last layer, leaves [rows, ...].
      batch: the microbatch's own inputs, leaves [rows, ...].
      training: False in evaluation.
      state: its frozen variables; None where it has none.
    """
    return sums(self.network.specs["head"].run(params, state or {}, training, x, batch)[0])

  @property
  def _layer(self) -> ModuleSpec:
    """The one kind of layer of a uniform stack."""
    return self.network.specs["layers/0"]

  @functools.cached_property
  def _head_ties(self) -> dict[str, str]:
    """Path in the head -> path in the embedding: all ties that a uniform stack may have."""
    return _of_head(self.network.ties)

  @functools.cached_property
  def _frozen_head_ties(self) -> dict[str, str]:
    """Path in the head -> path in the embedding, of variables that are not trained."""
    return _of_head(self.network.frozen_ties)

  def head_params(self, params: Tree) -> Tree:
    """All parameters that the head reads: its own and, at their paths in it, the tied ones."""
    head = params["head"]
    for theirs, ours in self._head_ties.items():
      head = set_path(head, theirs, get_path(params["embed"], ours))
    return head

  def head_state(self, state: Tree) -> Tree:
    """All frozen variables that the head reads: its own and, at their paths, the tied ones."""
    return self.network.state_of("head", state)

  def untie(self, grads: Tree) -> Tree:
    """Adds the gradients of tied leaves to the embedding's; the transpose of `head_params`.

    Args:
      grads: with the parts `embed` and `head`, `head` of the structure of `head_params(...)`.

    Returns:
      A tree with the structure of the parameters, where the head lacks its tied leaves.
    """
    # A tied leaf has two sums in the loop over ticks, one at each end of the pipeline.
    embed, head = grads["embed"], grads["head"]
    for theirs, ours in self._head_ties.items():
      embed = set_path(embed, ours, get_path(embed, ours) + get_path(head, theirs))
    return {**grads, "embed": embed, "head": without(head, self._head_ties)}

  def changing_specs(self, specs: Tree) -> list[Any]:
    """Partition specs of the statistics' sums: as their own, but whole along `fsdp`."""
    return [
      Spec(*(tuple(axis for axis in axes_of_entry(entry) if axis != FSDP) for entry in spec))
      for spec in self._changing_leaves(specs)
    ]

  def renewed(self, rows: Tree, counted: Sequence[jax.Array], vary: Callable[[Tree], Tree]) -> Tree:
    """The state of this device's layers after a step; statistics are replaced by their means.

    Args:
      rows: before the step, leaves [owned, ...].
      counted: the leaves that change, as the step has made them.
      vary: not needed here.
    """
    after = self.with_statistics(rows, counted)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), after, rows)

  def with_statistics(self, state: Tree, new: Sequence[jax.Array]) -> Tree:
    """The layers' state with other leaves in the place of those that a forward changes."""
    leaves, structure = jax.tree.flatten(state)
    others = iter(new)
    pairs = zip(leaves, jax.tree.leaves(self._layer.changing), strict=True)
    return jax.tree.unflatten(structure, [next(others) if yes else old for old, yes in pairs])

  # Where a schedule cuts the vocabulary

  @functools.cached_property
  def vocabulary_ends(self) -> VocabularyEnds:
    """Embedding and head in parts, for schedules that cut their tables over the stages.

    Raises:
      StackError: the stack does not say where its tables are.
    """
    if self.vocabulary is None:
      raise StackError(
        "the schedule cuts the vocabulary over the stages, but the stack does not say where its"
        " tables are; give LayerStack(vocabulary=jaxpipe.Tables(...)), or take a schedule without S"
        " and T"
      )
    specs, ties = self.network.specs, {**self._head_ties, **self._frozen_head_ties}
    return VocabularyEnds(self.vocabulary, specs["embed"], specs["head"], ties)

  def tables(self, devices: int) -> frozenset[str]:
    """Paths of the parameters that are cut over the stages with the vocabulary.

    Args:
      devices: P, of which each is to hold V / P rows.

    Raises:
      StackError: the stack does not say where its tables are, its ends lack the methods that
        `Tables` lists, or P does not divide V.
    """
    return self.vocabulary_ends.cut_over(devices)


def _of_head(ties: Mapping[str, str]) -> dict[str, str]:
  """Path in the head -> path in the embedding, of the ties between these two."""
  return {
    theirs.removeprefix("head/"): ours.removeprefix("embed/")
    for theirs, ours in ties.items()
    if theirs.startswith("head/") and ours.startswith("embed/")
  }


if TYPE_CHECKING:

  def _satisfies_its_protocol(stack: LayerStack) -> UniformStack:
    return stack
