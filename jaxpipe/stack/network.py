"""The modules of a stack in order, and how the canonical tree of parameters is made of theirs.

A module is named by where it stands: `embed`, `layers/0` ... `layers/L-1`, `head`. Consecutive
layers of one kind are a *run*. Their leaves are stacked along a leading layer dim, so that one loop
can go over them and a tree has as many leaves as there are kinds of layers:

    {"embed": ..., "layers": run, "head": ...}               one run: leaves of `layers` [L, ...]
    {"embed": ..., "layers": (run, run, ...), "head": ...}   several: leaves [of the run, ...]

This tree is the *canonical* one: it is what optimizers, checkpoints and the unpipelined reference
see. Model state has a tree of its own, made in the same way.

A variable may be *tied* to another module's: it exists once, in its owner's tree, and is put back
into the tree of each module that reads it just before the module is called. What layers of one run
share has a row for each layer that owns one (see `shared_rows`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe.parallel.protocol import Cut
from jaxpipe.stack.context import Context, LayerInputs, MicrobatchInputs
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.kinds import runs_of, same_computation
from jaxpipe.stack.layer_trace import ShapeWalk
from jaxpipe.stack.module.given import Given, Layer, shared
from jaxpipe.stack.module.parts import Factory, refuse_unsteady
from jaxpipe.stack.module.trainable import refuse_unmatched
from jaxpipe.stack.module_spec import ModuleSpec, same_structure, sums
from jaxpipe.stack.paths import get_path, set_path, without
from jaxpipe.stack.shared_rows import NOTHING_SHARED, SharedRows
from jaxpipe.stack.ties import below, get_owned, ties_of_leaves

Tree = Any


@dataclasses.dataclass(frozen=True)
class Network:
  """Ordered module specs, and the canonical tree joined from their trees.

  Attributes:
    specs: name of a module -> the module as data; `embed` first, then the layers, then `head`.
    ties: path of a tied leaf -> path of the leaf at its owner, both beginning with the name of a
      module, such as `head/table` -> `embed/table`. No owner is tied itself.
    frozen_ties: the same of leaves that are not trained, of the head and owned by the embedding.
    runs: numbers of the layers of each run, first to last; together all layers.
    reasons: number of the first layer of a run, but the first run -> how it differs from the layer
      before.
    shared: which leaves the layers share, where all of them are one run.
  """

  specs: Mapping[str, ModuleSpec]
  ties: Mapping[str, str]
  frozen_ties: Mapping[str, str]
  runs: tuple[range, ...]
  reasons: Mapping[int, str]
  shared: SharedRows

  @classmethod
  def trace(
    cls,
    embed: Factory,
    layers: Sequence[Factory],
    head: Factory,
    tied: Mapping[str, str],
    trainable: Any,
    example: Tree = None,
  ) -> Network:
    """Traces the modules without allocating anything.

    Args:
      embed: factory of the embedding.
      layers: factories of the layers, first to last.
      head: factory of the head.
      tied: path of a leaf or of a whole subtree -> the owner's path, as `LayerStack.tied`.
      trainable: NNX filter of the variables that are parameters.
      example: a batch or its shapes, by which layers are compared by what they compute; without
        one, layers whose attributes differ are of several kinds.

    Raises:
      StackError: a module that cannot be pipelined, ties that do not fit, a filter that matches
        nothing, or a statistic that several modules share.
    """
    traced: dict[int, ModuleSpec] = {}
    steady: set[int] = set()  # factories that have been called twice
    specs = {"embed": ModuleSpec.trace("embed", embed, trainable)}
    for i, factory in enumerate(layers):
      # Layers of one factory share the graph that was traced first.
      makes = id(factory.module if isinstance(factory, Layer) else factory)
      like = traced.get(makes)
      if like is not None and makes not in steady:
        refuse_unsteady(f"layers[{i}]", factory.module if isinstance(factory, Layer) else factory)
        steady.add(makes)
      specs[f"layers/{i}"] = spec = ModuleSpec.trace(f"layers[{i}]", factory, trainable, like)
      traced.setdefault(makes, spec)
    specs["head"] = ModuleSpec.trace("head", head, trainable)
    refuse_unmatched(trainable, _variables(specs))
    ties, frozen = ties_of_leaves(specs, {**_shared(specs), **tied})
    same = {} if example is None else same_computation(specs, example)
    rows = SharedRows.of(ties, len(layers))
    runs, reasons = runs_of(specs, ties, same, rows.owners)
    if rows.owners and len(runs) > 1:
      rows, (runs, reasons) = NOTHING_SHARED, runs_of(specs, ties, same)
    return cls(specs, ties, frozen, runs, reasons, rows)

  @property
  def depth(self) -> int:
    """Number of layers, L."""
    return len(self.specs) - 2

  @property
  def has_state(self) -> bool:
    """Whether any module has model state, that is variables which are not trained."""
    return any(spec.state for spec in self.specs.values())

  def given(self) -> dict[str, nnx.Module]:
    """Place -> the object that was given there, of modules that existed already."""
    return _given(self.specs)

  # Who owns what

  def own(self, name: str, params: Tree) -> Tree:
    """A module's parameters without the leaves that another module owns."""
    return without(params, below(name, self.ties))

  def owners(self, name: str) -> dict[str, str]:
    """For each leaf of a module that another owns: its path in the module -> the owner's path."""
    return {path: self.ties[f"{name}/{path}"] for path in below(name, self.ties)}

  def params_of(self, name: str, owned: Mapping[str, Tree]) -> Tree:
    """All parameters that a module reads, those of other modules included.

    Args:
      name: of the module.
      owned: name -> the module's own parameters, of all modules whose parameters are read.
    """
    params = owned[name]
    for path, owner in self.owners(name).items():
      params = set_path(params, path, get_owned(owned, owner))
    return params

  def own_state(self, name: str, state: Tree) -> Tree:
    """A module's state without the leaves that another module owns."""
    return without(state, below(name, self.frozen_ties))

  def state_of(self, name: str, owned: Mapping[str, Tree]) -> Tree:
    """All state that a module reads, that of other modules included.

    Args:
      name: of the module.
      owned: name -> the module's own state, of all modules whose state is read; empty where no
        module has any.
    """
    state = owned.get(name, {})
    for path in below(name, self.frozen_ties):
      state = set_path(state, path, get_owned(owned, self.frozen_ties[f"{name}/{path}"]))
    return state

  # Trees: one for each module, or the canonical one

  def param_shapes(self) -> dict[str, Tree]:
    """Name -> `jax.ShapeDtypeStruct`s of the parameters that the module owns."""
    return {name: self.own(name, spec.shapes) for name, spec in self.specs.items()}

  def state_shapes(self) -> dict[str, Tree]:
    """Name -> `jax.ShapeDtypeStruct`s of the state that the module owns."""
    return {name: self.own_state(name, spec.state) for name, spec in self.specs.items()}

  def join(self, trees: Mapping[str, Tree]) -> Tree:
    """The canonical tree of all modules' trees, which may be of arrays or of shapes."""
    runs = tuple(self.shared.stack([trees[f"layers/{i}"] for i in run]) for run in self.runs)
    # Of one run the stacked tree itself, not a tuple of one: what most stacks have stays plain.
    layers = runs[0] if len(runs) == 1 else runs
    return {"embed": trees["embed"], "layers": layers, "head": trees["head"]}

  def split(self, tree: Tree) -> dict[str, Tree]:
    """Name -> the module's own tree, out of the canonical tree; inverse of `join`."""
    runs = [tree["layers"]] if len(self.runs) == 1 else tree["layers"]
    out = {"embed": tree["embed"]}
    for run, stacked in zip(self.runs, runs, strict=True):
      for i in run:
        out[f"layers/{i}"] = self.shared.layer(stacked, i - run.start)
    return {**out, "head": tree["head"]}

  # Values

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Fresh parameters and fresh model state, two canonical trees."""
    made = {name: self.init_module(name, key) for name in self.specs}
    return (
      self.join({name: params for name, (params, _) in made.items()}),
      self.join({name: state for name, (_, state) in made.items()}),
    )

  def init_from_given(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Parameters and model state where some modules have values already; two canonical trees.

    Their values never are constants of a program: they are copied on the host. Fresh ones are made
    on the default device.

    Args:
      key: PRNG key of the modules that are made.
    """
    given = self.given()
    fresh = [name for name in self.specs if name not in given]
    # One program for all of them: one for each module would compile as often as there are modules.
    made = jax.jit(lambda key: {name: self.init_module(name, key) for name in fresh})(key)
    for name, module in given.items():
      params, state = jax.tree.map(np.array, self.specs[name].values(module))
      made[name] = self.own(name, params), self.own_state(name, state)
    return (
      self.join({name: params for name, (params, _) in made.items()}),
      self.join({name: state for name, (_, state) in made.items()}),
    )

  def init_module(self, name: str, key: jax.Array) -> tuple[Tree, Tree]:
    """Fresh parameters and fresh state that a module owns, of the stack's key."""
    params, state = self.specs[name].init(jax.random.fold_in(key, self._key_number(name)))
    return self.own(name, params), self.own_state(name, state)

  def _key_number(self, name: str) -> int:
    """The number that is folded into the stack's key for a module; no two have the same."""
    ends = {"embed": 0, "head": 1}
    return ends[name] if name in ends else 2 + layer_number(name)

  def init_layers(
    self, key: jax.Array, layers: jax.Array, cut: Cut, *, state: bool = False
  ) -> Tree:
    """Fresh parameters of some layers, of a network whose layers are all of one kind.

    Args:
      key: the stack's.
      layers: int32 [n], numbers of the layers, which may be known only as the program runs.
      cut: what of a layer to keep, applied as soon as it is made.
      state: makes the model state in place of the parameters.

    Returns:
      A layer's tree, leaves [n, ...]; what layers share has a row for each owner instead.
    """
    specs = [self.specs[f"layers/{i}"] for i in range(self.depth)]

    def make(spec: ModuleSpec, key: jax.Array) -> Tree:
      return spec.init(key)[state]

    # A branch for each factory, not for each layer: most stacks have one factory.
    makers = {id(spec.factory): functools.partial(make, spec) for spec in specs}
    number = {factory: n for n, factory in enumerate(makers)}
    which = jnp.array([number[id(spec.factory)] for spec in specs], jnp.int32)

    def one(i: jax.Array) -> Tree:
      made = jax.lax.switch(which[i], list(makers.values()), jax.random.fold_in(key, i + 2))
      # Constants, such as fresh statistics, are made to depend on i: XLA refuses a program over a
      # mesh whose results depend on nothing (jaxlib 0.10.2).
      made = jax.tree.map(lambda leaf: jnp.where(i < 0, jnp.zeros_like(leaf), leaf), made)
      return cut("layers", made)

    # lax.map, not vmap: one compiled body gives every layer, so that values do not depend on how
    # many layers this device creates.
    made = jax.lax.map(one, layers)
    if state:
      return made  # nothing of it is shared
    # A loop for each set of owners, of which there is mostly one.
    for owners in {tuple(sorted(set(each))) for each in self.shared.owners.values()}:
      owned = jax.lax.map(one, jnp.array(owners, jnp.int32))
      for path, each in self.shared.owners.items():
        if set(each) == set(owners):
          made = set_path(made, path, get_path(owned, path))
    return made

  # Calls

  def call(
    self, name: str, params: Tree, state: Tree, x: Tree, training: bool, inputs: MicrobatchInputs
  ) -> tuple[Tree, Tree]:
    """Dispatches by name: `embed(batch)`, `layer(x, context)`, `head(x, batch)`.

    Args:
      name: of the module.
      params: all parameters that it reads, tied ones included.
      state: all model state that it reads, tied leaves included.
      x: what the module before returned, leaves [rows, ...]; the embedding does not read it.
      training: False in evaluation, where dropout is the identity and statistics stay.
      inputs: of the microbatch.

    Returns:
      What the module returns, of the head `(loss_sum, (weight, metrics))`; and its state after the
      call.
    """
    spec = self.specs[name]
    if name == "embed":
      return spec.run(params, state, training, inputs["batch"])
    if name == "head":
      out, after = spec.run(params, state, training, x, inputs["batch"])
      return sums(out), after
    # Dropout is keyed by the layer's number in the model: its masks are then the same in whatever
    # stage the layer lies.
    layer_inputs: LayerInputs = {**inputs, "layer": layer_number(name)}
    context = Context.create(training, **layer_inputs)
    return spec.run(params, state, training, x, context=context)

  def look(self, batch: Tree, alike: bool) -> None:
    """Traces all modules where that has not been done yet, by which it is known what layers draw.

    Args:
      batch, alike: as for `check_shapes`.
    """
    traced = range(1 if alike else self.depth)
    if not all(self.specs[f"layers/{i}"].draws for i in traced):
      self.check_shapes(batch, alike)

  def check_shapes(self, batch: Tree, alike: bool) -> Tree:
    """Traces all modules on a batch, without computing anything.

    Args:
      batch: arrays or shapes, leaves [B, ...].
      alike: whether all layers are of one kind and must return what they take; the first is then
        traced for all.

    Returns:
      The shapes of the first layer's x.

    Raises:
      StackError: a module that cannot take what the one before returns, or a layer whose output is
        unlike its input although it must not be.
    """
    walk = ShapeWalk(batch)
    x = first = walk.through(self.specs["embed"])
    if alike:
      check_alike(x, walk.through(self.specs["layers/0"]))
    else:
      for i in range(self.depth):
        walk.through(self.specs[f"layers/{i}"])
    walk.through(self.specs["head"])
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


def keep_whole(part: str, tree: Tree) -> Tree:
  """The `cut` of `init_layers_and_ends` by which a device keeps all of what it makes."""
  return tree


def layer_number(name: str) -> int:
  """The number of a layer, out of its name: 3 of `layers/3`."""
  return int(name.partition("/")[2])


def _variables(specs: Mapping[str, ModuleSpec]) -> Iterator[tuple[tuple[Any, ...], Any]]:
  """Path and variable of every module's variables, random streams left out."""
  for place, spec in specs.items():
    module = nnx.eval_shape(functools.partial(_made, spec.factory))
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState))):
      yield (place, *path), variable


def _made(factory: Factory) -> nnx.Module:
  """A module of the factory, for its variables alone."""
  return factory(nnx.Rngs(0))


def _given(specs: Mapping[str, ModuleSpec]) -> dict[str, nnx.Module]:
  """Place -> the object that was given there, of modules that existed already."""
  return {
    place: spec.factory.module for place, spec in specs.items() if isinstance(spec.factory, Given)
  }


def _shared(specs: Mapping[str, ModuleSpec]) -> dict[str, str]:
  """Ties of the variables that several given modules hold: path -> owner's path.

  Raises:
    StackError: they share a statistic, of which each would keep its own.
  """
  statistics, others = shared(_given(specs))
  changing = {place: spec.changing for place, spec in specs.items()}
  for theirs, ours in statistics.items():
    if get_owned(changing, theirs) or get_owned(changing, ours):
      raise StackError(
        f"{theirs} and {ours} are one nnx.BatchStat, which both modules would change; give each a"
        " norm of its own, or switch it off (use_running_average=True)"
      )
  shapes = {place: spec.shapes for place, spec in specs.items()}
  ties = {}
  for theirs, ours in others.items():
    here, there = (get_owned(shapes, path) is not None for path in (theirs, ours))
    if here != there:
      raise StackError(
        f"{theirs} and {ours} are one variable, and trainable= trains it at one of the two places"
        " only; train it at both, or at neither"
      )
    # Frozen variables never change, and copies of them stay alike.
    if here:
      ties[theirs] = ours
  return ties
