"""A network as the pipeline sees it: an embedding, a stack of layers and a head, all built lazily.

The parts are *factories*, `rngs -> nnx.Module`: nothing is allocated until it is known on which
device it will live. The stack turns them into pure functions of one parameter tree, which is all
that the executor and the unpipelined reference ever see; neither knows a Flax module.

    embed(batch)      -> x                            any pytree, leaves [rows, ...]
    layer(x, context) -> x                            any pytree
    head(x, batch)    -> (loss_sum, weight, metrics)  sums over the rows, never means

Layers of one kind that return what they take are *uniform*: they lie stacked, and the pipeline
loops over them. All other stacks lie packed, each stage as one row; see `packed`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.parallel.placing import Tree, init_placed
from jaxpipe.parallel.rules import NONE, Rules
from jaxpipe.stack.context import Context, LayerInputs
from jaxpipe.stack.from_modules import parts_of_modules
from jaxpipe.stack.module_spec import Factory, ModuleSpec, StackError, fresh, same_structure, sums
from jaxpipe.stack.network import Network
from jaxpipe.stack.packed import Packed
from jaxpipe.stack.paths import get_path, set_path, without
from jaxpipe.stack.vocabulary import Tables, check_divides


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStack:
  """A network of `len(layers)` layers between an embedding and a head.

  Attributes:
    embed: factory of a module `batch -> x`.
    layers: factories of modules `(x, context) -> x`; each may start its own layer from other
      values, and need not be like the one before.
    head: factory of a module `(x, batch) -> (loss_sum, weight, metrics)`.
    tied: parameters that are another module's own: path -> the owner's path, each `/`-joined, such
      as `{"head/table": "embed/table"}` or `{"layers/1/base": "layers/0/base"}`, of a leaf or of
      all leaves below. The copy does not exist in the tree.
    vocabulary: where the tables over the vocabulary are, for schedules that cut them over the
      stages; None where both ends stay whole.
    rules: how parameters lie over `tensor` and `expert`, and over which axes the modules share
      their work; by default over none. `fsdp` needs no rules.
    partition: how many layers each stage has, first to last; by default as even as can be. The
      embedding stands before the first stage's layers, the head behind the last's.
    trainable: NNX filter of the variables that are parameters; all others are state.

  Raises:
    StackError: no layers, random streams, tied shapes that differ, or tables that do not exist.
  """

  embed: Factory
  layers: Sequence[Factory]
  head: Factory
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  vocabulary: Tables | None = None
  rules: Rules = NONE
  partition: Sequence[int] | None = None
  trainable: Any = nnx.Param
  network: Network = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    object.__setattr__(self, "layers", tuple(self.layers))
    if not self.layers:
      raise StackError("a stack needs at least one layer; got layers=[]")
    network = Network.trace(self.embed, self.layers, self.head, self.tied, self.trainable)
    object.__setattr__(self, "network", network)
    self._check_partition()
    if self.vocabulary:
      shapes = {part: network.specs[part].shapes for part in ("embed", "head")}
      self.vocabulary.check(shapes, self._head_ties)

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
        and which shares its weights where it stands twice;
        a Linen module, whose shapes are inferred; or a function of x. A module that has a parameter
        `context` is given the layer's `Context`.
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
    embed, layers, head, again = parts_of_modules(modules, loss, batch, inputs, trainable)
    tied = {**again, **options.pop("tied", {})}
    return cls(embed, layers, head, tied=tied, trainable=trainable, **options)

  def _check_partition(self) -> None:
    if self.partition is None:
      return
    try:
      sizes = tuple(map(operator.index, self.partition))
    except TypeError:
      raise StackError(
        f"partition={self.partition!r} is no list of whole numbers; give how many layers each stage"
        " has, or let jaxpipe.partitioned(stack, schedule, batch, METHOD) choose"
      ) from None
    object.__setattr__(self, "partition", sizes)
    if min(sizes, default=0) < 0:
      raise StackError(f"partition {list(sizes)} has a stage of less than 0 layers")
    if sum(self.partition) != self.depth:
      raise StackError(
        f"partition {list(self.partition)} has {sum(self.partition)} layers and the stack"
        f" {self.depth}; give every stage its number of layers, 0 or more"
      )

  @property
  def uniform(self) -> bool:
    """Whether the layers are of one kind and lie stacked."""
    ties = self.network.ties.items()
    if not all(a.startswith("head/") and b.startswith("embed/") for a, b in ties):
      return False
    return self.partition is None and len(self.network.runs) == 1 and not self.has_state

  @property
  def has_state(self) -> bool:
    """Whether any module holds variables that are not trained."""
    return any(spec.state for spec in self.network.specs.values())

  @functools.cached_property
  def _specs(self) -> dict[str, ModuleSpec]:
    specs = self.network.specs
    return {"embed": specs["embed"], "layers": specs["layers/0"], "head": specs["head"]}

  @functools.cached_property
  def _head_ties(self) -> dict[str, str]:
    """Head path -> embed path: all ties of a uniform stack."""
    return {
      theirs.removeprefix("head/"): ours.removeprefix("embed/")
      for theirs, ours in self.network.ties.items()
      if theirs.startswith("head/") and ours.startswith("embed/")
    }

  def laid_out(self, schedule: Any) -> Any:
    """The stack as it lies on the devices of a schedule: itself, or packed.

    Raises:
      StackError: a partition into another number of stages, or a schedule that a packed stack
        cannot follow.
    """
    return self if self.uniform else Packed.of(self, schedule)

  def pack(self, tree: Tree) -> Tree:
    """A canonical tree as `place` lays it out before it orders the layers: as it is."""
    return tree

  def unpack(self, tree: Tree) -> Tree:
    """Its inverse."""
    return tree

  @property
  def depth(self) -> int:
    """Number of layers."""
    return len(self.layers)

  def init(
    self, key: jax.Array, example_batch: Tree, schedule: Any = None, mesh: Any = None
  ) -> Tree:
    """Returns the parameters: the canonical tree, or the same values placed over a mesh.

    Args:
      key: PRNG key; layer i's values depend on it and on i alone.
      example_batch: a batch, or its `jax.ShapeDtypeStruct`s; only shapes are read, to check that
        every layer returns what it takes.
      schedule: with `mesh`, says which device holds which layers. Each device then creates its own
        layers only: the whole tree is never in one place.
      mesh: mesh with a `stage` axis.

    Returns:
      `{"embed": ..., "layers": ..., "head": ...}`, `layers` with a leading layer dim.
    """
    if (schedule is None) != (mesh is None):
      raise StackError("init takes a schedule and a mesh, or neither; only one was given")
    self.check_shapes(example_batch)
    if schedule is not None:
      return init_placed(self.laid_out(schedule), key, schedule, mesh)
    if self.uniform:
      return jax.jit(self.init_layers_and_ends)(key, jnp.arange(self.depth))
    return jax.jit(lambda key: self.network.init(key)[0])(key)

  def init_state(
    self, key: jax.Array, example_batch: Tree, schedule: Any = None, mesh: Any = None
  ) -> Tree:
    """Returns the state that goes with `init` of the same key: frozen weights, statistics.

    Args and Returns: as for `init`; a part without state has an empty dict.
    """
    if (schedule is None) != (mesh is None):
      raise StackError("init_state takes a schedule and a mesh, or neither; only one was given")
    self.check_shapes(example_batch)
    if schedule is not None:
      laid = self.laid_out(schedule)
      return init_placed(laid, key, schedule, mesh, state=True) if self.has_state else {}
    return jax.jit(lambda key: self.network.init(key)[1])(key)

  def init_layers_and_ends(
    self,
    key: jax.Array,
    layers: jax.Array,
    cut: Callable[[str, Tree], Tree] = lambda part, tree: tree,
  ) -> Tree:
    """Parameters of the layers numbered in `layers` (int32 [n]), and those of both ends.

    Args:
      key, layers: see `init`.
      cut: what to keep of a part (one layer, or an end) as soon as it is made.
    """
    make = lambda factory, key: fresh(factory, key, self.trainable)[0]  # noqa: E731
    inits = {id(f): functools.partial(make, f) for f in self.layers}
    number = {name: n for n, name in enumerate(inits)}
    which = jnp.array([number[id(factory)] for factory in self.layers], jnp.int32)

    def one(i: jax.Array) -> Tree:
      made = jax.lax.switch(which[i], list(inits.values()), jax.random.fold_in(key, i + 2))
      return cut("layers", made)

    # lax.map, not vmap: one compiled body gives every layer, so that values do not depend on how
    # many layers this device creates.
    return {
      "embed": cut("embed", self._specs["embed"].init(jax.random.fold_in(key, 0))[0]),
      "layers": jax.lax.map(one, layers),
      "head": cut(
        "head", without(self._specs["head"].init(jax.random.fold_in(key, 1))[0], self._head_ties)
      ),
    }

  def param_shapes(self) -> Tree:
    """The canonical tree as `jax.ShapeDtypeStruct`s."""
    shapes: Tree = self.network.join(self.network.param_shapes())
    return shapes

  def state_shapes(self) -> Tree:
    """The state's canonical tree as `jax.ShapeDtypeStruct`s."""
    shapes: Tree = self.network.join(self.network.state_shapes())
    return shapes

  def changing(self) -> Tree:
    """The state's canonical tree, True for what a forward in training changes."""
    network = self.network
    each = {name: spec.changing for name, spec in network.specs.items()}
    runs = tuple(each[f"layers/{run.start}"] for run in network.runs)
    layers = runs[0] if len(runs) == 1 else runs
    return {"embed": each["embed"], "layers": layers, "head": each["head"]}

  def apply_embed(self, params: Tree, batch: Tree, training: bool = True) -> Tree:
    """`embed(batch) -> x`, given the embedding's own parameters."""
    return self._specs["embed"].run(params, {}, training, batch)[0]

  def apply_layer(self, params: Tree, x: Tree, training: bool, inputs: LayerInputs) -> Tree:
    """One layer, given its own parameters (no layer dim)."""
    context = Context.create(training, **inputs)
    return self._specs["layers"].run(params, {}, training, x, context)[0]

  def apply_head(
    self, params: Tree, x: Tree, batch: Tree, training: bool = True
  ) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
    """The head as `value_and_grad(has_aux=True)` wants it: `loss_sum, (weight, metrics)`.

    Args:
      params: `head_params(...)`, tied leaves included.
      x: output of the last layer.
      batch: the microbatch's own inputs.
      training: see `Context`.
    """
    return sums(self._specs["head"].run(params, {}, training, x, batch)[0])

  def tables(self, devices: int) -> frozenset[str]:
    """Paths of the parameters that are cut over the stages with the vocabulary.

    Args:
      devices: P, of which each is to hold V / P rows.

    Raises:
      StackError: the stack does not say where its tables are, its ends lack the methods that
        `Tables` lists, or P does not divide V.
    """
    if self.vocabulary is None:
      raise StackError(
        "the schedule cuts the vocabulary over the stages, but the stack does not say where its"
        " tables are; give LayerStack(vocabulary=jaxpipe.Tables(...)), or take a schedule without S"
        " and T"
      )
    self._specs["embed"].require("ids", "enter")
    self._specs["head"].require("features", "targets")
    head = get_path(self._specs["head"].shapes, self.vocabulary.head)
    check_divides(head.shape[0], devices)
    embed, head = self.vocabulary.embed, self.vocabulary.head
    return frozenset(
      {f"embed/{embed}"} | ({f"head/{head}"} - {f"head/{t}" for t in self._head_ties})
    )

  def embed_table(self, params: Tree) -> jax.Array:
    """The embedding's table, or a shard of it, given the embedding's parameters."""
    table: jax.Array = get_path(params, self._tables.embed)
    return table

  def head_table(self, params: Tree) -> jax.Array:
    """The head's, given `head_params(...)`."""
    table: jax.Array = get_path(params, self._tables.head)
    return table

  def ids(self, params: Tree, batch: Tree) -> jax.Array:
    """The rows of the embedding's table that a microbatch looks up; see `Tables`."""
    rows: jax.Array = self._specs["embed"].call("ids", params, batch)
    return rows

  def enter(self, params: Tree, rows: jax.Array, batch: Tree) -> Tree:
    """What the embedding makes of them."""
    return self._specs["embed"].call("enter", params, rows, batch)

  def features(self, params: Tree, x: Tree, batch: Tree) -> jax.Array:
    """What the head multiplies with its table."""
    h: jax.Array = self._specs["head"].call("features", params, x, batch)
    return h

  def targets(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
    """The targets of a microbatch and their weights."""
    targets, weights = self._specs["head"].call("targets", params, batch)
    return targets, weights

  def check_shared_metrics(self, params: Tree, x: Tree, batch: Tree) -> None:
    """Raises StackError where the head has metrics that a vocabulary cut over the stages lacks."""
    _, (_, metrics) = jax.eval_shape(self.apply_head, params, x, batch)
    if not isinstance(metrics, Mapping) or set(metrics) != {"correct"}:
      named = ", ".join(sorted(metrics)) if isinstance(metrics, Mapping) else str(type(metrics))
      raise StackError(
        f"head returns metrics {named}, and a vocabulary cut over the stages gives only correct;"
        " return only that, or use a schedule whose last stage holds the whole head"
      )

  @property
  def _tables(self) -> Tables:
    assert self.vocabulary is not None  # `tables` has been asked before
    return self.vocabulary

  def head_module(self, params: Tree) -> nnx.Module:
    """The head itself, for what lies beyond its loss (logits when text is sampled)."""
    return nnx.merge(self._specs["head"].graph, self.head_params(params))

  def head_params(self, params: Tree) -> Tree:
    """What the head reads: its own parameters and, at their paths, the embedding's tied ones."""
    head = params["head"]
    for theirs, ours in self._head_ties.items():
      head = set_path(head, theirs, get_path(params["embed"], ours))
    return head

  def untie(self, grads: Tree) -> Tree:
    """Transpose of `head_params`: adds the tied leaves' gradients to the embedding's."""
    embed, head = grads["embed"], grads["head"]
    for theirs, ours in self._head_ties.items():
      embed = set_path(embed, ours, get_path(embed, ours) + get_path(head, theirs))
    return {**grads, "embed": embed, "head": without(head, self._head_ties)}

  def check_shapes(self, batch: Tree) -> Tree:
    """Returns the shapes of the first layer's x.

    Raises:
      StackError: a layer that cannot take what the one before returns; or, where the stack is
        uniform, one whose output is unlike its input.
    """
    x = first = self.network.try_end("embed", batch)
    if not self.uniform:
      for i in range(self.depth):
        x = self.network.try_layer(i, x, batch)
    else:
      check_alike(x, self.network.try_layer(0, x, batch))
    self.network.try_end("head", x, batch)
    return first


def check_alike(x: Tree, y: Tree) -> None:
  """Raises StackError where y, a layer's output for x, has other shapes, dtypes or structure."""
  remedy = "; a layer must return what it takes, or give LayerStack(partition=[...])"
  if not same_structure(x, y):
    raise StackError(
      f"layers[0] takes {jax.tree.structure(x)} but returns {jax.tree.structure(y)}{remedy}"
    )
  for (path, a), b in zip(jax.tree.leaves_with_path(x), jax.tree.leaves(y), strict=True):
    if (a.shape, a.dtype) != (b.shape, b.dtype):
      raise StackError(
        f"layers[0] takes {a.dtype}{list(a.shape)} but returns {b.dtype}{list(b.shape)}"
        f" at x{jax.tree_util.keystr(path)}{remedy}"
      )
