"""A network as the pipeline sees it: an embedding, a stack of layers and a head, all built lazily.

The three parts are *factories*, `rngs -> nnx.Module`: nothing is allocated until it is known on
which device it will live. The stack turns them into pure functions of one parameter tree, which is
all that the executor and the unpipelined reference ever see; neither knows a Flax module.

    embed(batch)      -> x                            any pytree, leaves [rows, ...]
    layer(x, context) -> x                            structure, shapes and dtypes of its input
    head(x, batch)    -> (loss_sum, weight, metrics)  sums over the rows, never means
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.context import Context, LayerInputs
from jaxpipe.models.part import Factory, Part, StackError, fresh, same_structure
from jaxpipe.models.paths import get_path, set_path, without
from jaxpipe.models.tables import Tables, check_divides
from jaxpipe.parallel.placing import Tree, init_placed
from jaxpipe.parallel.rules import NONE, Rules


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStack:
  """A network of `len(layers)` layers between an embedding and a head.

  Attributes:
    embed: factory of a module `batch -> x`.
    layers: factories of modules `(x, context) -> x`, all of one kind; each may start its own layer
      from other values.
    head: factory of a module `(x, batch) -> (loss_sum, weight, metrics)`.
    tied: parameters of the head that are the embedding's own: head path -> embed path, each
      `/`-joined, such as `{"table": "table"}`. The head's copy does not exist in the tree.
    vocabulary: where the tables over the vocabulary are, for schedules that cut them over the
      stages; None where both ends stay whole.
    rules: how parameters lie over `tensor` and `expert`, and over which axes the modules share
      their work; by default over none. `fsdp` needs no rules.

  Raises:
    StackError: no layers, layers of several kinds, mutable state, tied shapes that differ, or
      tables that do not exist.
  """

  embed: Factory
  layers: Sequence[Factory]
  head: Factory
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  vocabulary: Tables | None = None
  rules: Rules = NONE
  _parts: dict[str, Part] = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    object.__setattr__(self, "layers", tuple(self.layers))
    if not self.layers:
      raise StackError("a stack needs at least one layer; got layers=[]")
    first = Part.trace("layers[0]", self.layers[0])
    for i, factory in enumerate(self.layers[1:], 1):
      if factory is not self.layers[0] and not first.same_kind(Part.trace(f"layers[{i}]", factory)):
        raise StackError(
          f"layers[{i}] differs from layers[0] in its parameters or static attributes;"
          " unlike layers in one stack are not supported yet: build all layers alike"
        )
    parts = {
      "embed": Part.trace("embed", self.embed),
      "layers": first,
      "head": Part.trace("head", self.head),
    }
    object.__setattr__(self, "_parts", parts)
    for theirs, ours in self.tied.items():
      a, b = get_path(parts["head"].shapes, theirs), get_path(parts["embed"].shapes, ours)
      if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        raise StackError(f"tied: head {theirs} is {a}, embed {ours} is {b}; they must be alike")
    if self.vocabulary:
      self.vocabulary.check({part: parts[part].shapes for part in ("embed", "head")}, self.tied)

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
    if schedule is None:
      return jax.jit(self.init_layers_and_ends)(key, jnp.arange(self.depth))
    return init_placed(self, key, schedule, mesh)

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
    inits = {id(f): functools.partial(fresh, f) for f in self.layers}
    number = {name: n for n, name in enumerate(inits)}
    which = jnp.array([number[id(factory)] for factory in self.layers], jnp.int32)

    def one(i: jax.Array) -> Tree:
      made = jax.lax.switch(which[i], list(inits.values()), jax.random.fold_in(key, i + 2))
      return cut("layers", made)

    # lax.map, not vmap: one compiled body gives every layer, so that values do not depend on how
    # many layers this device creates.
    return {
      "embed": cut("embed", self._parts["embed"].init(jax.random.fold_in(key, 0))),
      "layers": jax.lax.map(one, layers),
      "head": cut("head", without(self._parts["head"].init(jax.random.fold_in(key, 1)), self.tied)),
    }

  def param_shapes(self) -> Tree:
    """The canonical tree as `jax.ShapeDtypeStruct`s."""
    embed, layers, head = (self._parts[part].shapes for part in ("embed", "layers", "head"))
    stacked = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((self.depth, *leaf.shape), leaf.dtype), layers
    )
    return {"embed": embed, "layers": stacked, "head": without(head, self.tied)}

  def apply_embed(self, params: Tree, batch: Tree) -> Tree:
    """`embed(batch) -> x`, given the embedding's own parameters."""
    return self._parts["embed"](params, batch)

  def apply_layer(self, params: Tree, x: Tree, training: bool, inputs: LayerInputs) -> Tree:
    """One layer, given its own parameters (no layer dim)."""
    return self._parts["layers"](params, x, Context.create(training, **inputs))

  def apply_head(
    self, params: Tree, x: Tree, batch: Tree
  ) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
    """The head as `value_and_grad(has_aux=True)` wants it: `loss_sum, (weight, metrics)`.

    Args:
      params: `head_params(...)`, tied leaves included.
      x: output of the last layer.
      batch: the microbatch's own inputs.
    """
    out = self._parts["head"](params, x, batch)
    if not isinstance(out, tuple) or len(out) != 3:
      raise StackError(f"head must return (loss_sum, weight, metrics); it returns {type(out)}")
    loss_sum, weight, metrics = out
    if jnp.shape(loss_sum) or jnp.shape(weight):
      raise StackError(
        f"head must return scalar sums; loss_sum has shape {jnp.shape(loss_sum)},"
        f" weight {jnp.shape(weight)}: sum over the rows"
      )
    return loss_sum, jax.lax.stop_gradient((weight, metrics))

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
    self._parts["embed"].require("ids", "enter")
    self._parts["head"].require("features", "targets")
    head = get_path(self._parts["head"].shapes, self.vocabulary.head)
    check_divides(head.shape[0], devices)
    embed, head = self.vocabulary.embed, self.vocabulary.head
    return frozenset({f"embed/{embed}"} | ({f"head/{head}"} - {f"head/{t}" for t in self.tied}))

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
    rows: jax.Array = self._parts["embed"].call("ids", params, batch)
    return rows

  def enter(self, params: Tree, rows: jax.Array, batch: Tree) -> Tree:
    """What the embedding makes of them."""
    return self._parts["embed"].call("enter", params, rows, batch)

  def features(self, params: Tree, x: Tree, batch: Tree) -> jax.Array:
    """What the head multiplies with its table."""
    h: jax.Array = self._parts["head"].call("features", params, x, batch)
    return h

  def targets(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
    """The targets of a microbatch and their weights."""
    targets, weights = self._parts["head"].call("targets", params, batch)
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
    return nnx.merge(self._parts["head"].graph, self.head_params(params))

  def head_params(self, params: Tree) -> Tree:
    """What the head reads: its own parameters and, at their paths, the embedding's tied ones."""
    head = params["head"]
    for theirs, ours in self.tied.items():
      head = set_path(head, theirs, get_path(params["embed"], ours))
    return head

  def untie(self, grads: Tree) -> Tree:
    """Transpose of `head_params`: adds the tied leaves' gradients to the embedding's."""
    embed, head = grads["embed"], grads["head"]
    for theirs, ours in self.tied.items():
      embed = set_path(embed, ours, get_path(embed, ours) + get_path(head, theirs))
    return {**grads, "embed": embed, "head": without(head, self.tied)}

  def check_shapes(self, batch: Tree) -> Tree:
    """Returns the shapes of x; raises StackError where a layer's output is unlike its input."""
    shapes = self.param_shapes()
    layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), shapes["layers"])
    x = jax.eval_shape(self.apply_embed, shapes["embed"], batch)
    rows = _rows(batch)

    def one(params: Tree, x: Tree, batch: Tree) -> Tree:
      key, number = jax.random.key(0), jnp.int32(0)
      inputs = LayerInputs(
        batch=batch, key=key, layer=number, microbatch=number, rows=jnp.arange(rows)
      )
      return self.apply_layer(params, x, True, inputs)

    check_alike(x, jax.eval_shape(one, layer, x, batch))
    jax.eval_shape(self.apply_head, self.head_params(shapes), x, batch)
    return x


def check_alike(x: Tree, y: Tree) -> None:
  """Raises StackError where y, a layer's output for x, has other shapes, dtypes or structure."""
  if not same_structure(x, y):
    raise StackError(f"layers[0] takes {jax.tree.structure(x)} but returns {jax.tree.structure(y)}")
  for (path, a), b in zip(jax.tree.leaves_with_path(x), jax.tree.leaves(y), strict=True):
    if (a.shape, a.dtype) != (b.shape, b.dtype):
      raise StackError(
        f"layers[0] takes {a.dtype}{list(a.shape)} but returns {b.dtype}{list(b.shape)}"
        f" at x{jax.tree_util.keystr(path)}; a layer must return what it takes"
      )


def _rows(batch: Tree) -> int:
  """Rows of a batch; x may have leaves without rows, such as a loss that layers add to."""
  for path, leaf in jax.tree.leaves_with_path(batch):
    if not jnp.shape(leaf):
      raise StackError(f"batch{jax.tree_util.keystr(path)} is a scalar; every leaf is [B, ...]")
    return int(jnp.shape(leaf)[0])
  raise StackError("the batch has no leaves; every leaf is [B, ...]")
