"""One module as data: its static graph, and the shapes of its parameters and of its state.

A Flax NNX module is an object that holds its variables. The pipeline wants pure functions of trees
that it can place, cut and pack, so that a module is taken apart once, before anything is allocated,
and put together again inside every call:

    factory --trace--> ModuleSpec (graph, shapes)       no arrays
    graph + parameters + state --run--> output, state   inside a traced function

*Parameters* are what is trained. All other variables are *model state*: running statistics, which a
forward in training changes, and weights that are frozen, which nothing changes. Random streams are
neither: every call is given keys of its own step, layer, microbatch and rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import ROWS, SEQUENCE
from jaxpipe.stack.context import Context
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module.given import Given, Layer
from jaxpipe.stack.module.modes import count_switched_off, set_mode, switched_off_statistics
from jaxpipe.stack.module.parts import (
  Factory,
  built,
  kept_flags,
  module_label,
  place_of,
  refuse_arrays,
  split_module,
)
from jaxpipe.stack.module.row_keys import Draws
from jaxpipe.stack.module.signature import CallPlan, plan_call
from jaxpipe.stack.module.trainable import Predicate, at_place
from jaxpipe.stack.paths import get_path, merged

Tree = Any


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
  """A Flax module taken apart: static graph, parameter shapes, state shapes.

  Attributes:
    name: how messages name it by its place, `embed`, `layers[3]` or `head`.
    factory: builds the module from `nnx.Rngs`.
    trainable: which variables are parameters, a predicate of paths within the module.
    graph: the static half of `nnx.split`: all of the module but the values of its variables.
    shapes: the parameters, a nested dict of `jax.ShapeDtypeStruct`s.
    state: the model state, a nested dict of `jax.ShapeDtypeStruct`s: all other variables but keys.
    changing: a dict of the structure of `state`, True for what a forward in training may change:
      variables of type `nnx.BatchStat`, or of one derived from it, but those of a norm that was
      found switched off.
    streams: keys and counts of random streams that the module keeps, such as a dropout's, a nested
      dict of `jax.ShapeDtypeStruct`s; every call is given fresh ones.
    kind: the module's class.
    label: how messages name the class: for a wrapped Linen module or a function, that of what is
      wrapped, else the name of the class.
    plan: what the module is called with.
    draws: the shapes of what it draws from its keys, once a `ShapeWalk` has shown them and that it
      changes nothing but statistics; empty before.
    switched_off: number of inner norms and dropouts that were found in evaluation mode.
  """

  name: str
  factory: Factory
  trainable: Predicate
  graph: Any
  shapes: Tree
  state: Tree
  changing: Tree
  streams: Tree
  kind: type
  label: str
  plan: CallPlan
  draws: list[Draws]
  switched_off: int

  @classmethod
  def trace(
    cls, name: str, factory: Factory | Layer, trainable: Any = nnx.Param, like: Any = None
  ) -> ModuleSpec:
    """Builds the module abstractly, without arrays, and refuses what cannot be pipelined.

    Args:
      name: how messages name the module.
      factory: builds it, or a `Layer` of such a factory.
      trainable: NNX filter of the variables that are parameters, of paths in the whole stack.
      like: another spec of the same factory, of which all is taken that its place does not change.

    Raises:
      StackError: an unwrapped Linen module, an array outside variables, a parameter that has no
        gradient, or a call with a parameter that a stack cannot give.
    """
    entries: Mapping[str, str] = {}
    by_position = not isinstance(factory, Layer)
    draws: list[Draws] = [] if like is None else like.draws
    if isinstance(factory, Layer):
      entries, draws = factory.entries, factory.draws
      factory = factory.module
    if like is not None and isinstance(trainable, type):
      # A filter by type does not see places, so that nothing need be traced again.
      return dataclasses.replace(like, name=name, draws=draws)
    if _is_linen(factory):
      raise StackError(
        f"{name} is a Linen module; wrap it: jaxpipe.linen(Module(), example inputs ...)"
      )
    if isinstance(factory, nnx.Module):
      factory = Given(factory)
    factory, module = built(factory)
    label = module_label(module)
    where = f"{name} ({label})"
    refuse_arrays(where, module)
    chosen = at_place(place_of(name), trainable)
    graph, streams, params, state = split_module(module, chosen)
    shapes = nnx.to_pure_dict(params)
    _refuse_dtypes(where, shapes)
    changing, frozen = nnx.to_pure_dict(state), switched_off_statistics(module)
    for path, variable in nnx.to_flat_state(state):
      _set(changing, path, issubclass(variable.type, nnx.BatchStat) and path not in frozen)
    kind = type(module)
    is_layer = name.startswith("layers")
    if jax.tree.leaves(nnx.to_pure_dict(streams)) and not is_layer:
      raise StackError(
        f"{where} keeps a random stream, and only layers are given keys: make it a layer of its own"
      )
    plan = plan_call(
      where,
      kind.__call__,
      arguments=2 if name == "head" else 1,
      bound=False,
      entries=entries,
      closed_flags=kept_flags(module),
      context=is_layer,
      by_position=by_position,
    )
    return cls(
      name=name,
      factory=factory,
      trainable=chosen,
      graph=graph if like is None else like.graph,
      shapes=shapes,
      state=nnx.to_pure_dict(state),
      changing=changing,
      streams=nnx.to_pure_dict(streams),
      kind=kind,
      label=label,
      plan=plan,
      draws=draws,
      switched_off=count_switched_off(module),
    )

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Returns fresh parameters, tied leaves included, and fresh state: nested dicts of arrays."""
    return self.values(self.factory(nnx.Rngs(key)))

  def values(self, module: nnx.Module) -> tuple[Tree, Tree]:
    """Returns the parameters and the state of a module of this spec: nested dicts of arrays."""
    _, _, params, state = split_module(module, self.trainable)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

  def build(self, params: Tree, state: Tree) -> Any:
    """Puts a new module together, in the mode and with the streams with which it was found.

    Args:
      params: all of its parameters, a nested dict of the structure of `shapes`.
      state: its state, of the structure of `state`.
    """
    streams: Tree = {}
    if self.streams:
      _, found, _, _ = split_module(self.factory(nnx.Rngs(0)), self.trainable)
      streams = nnx.to_pure_dict(found)
    return nnx.merge(self.graph, merged(merged(params, state), streams))

  def run(
    self,
    params: Tree,
    state: Tree,
    training: bool,
    *given: Any,
    context: Context | None = None,
  ) -> tuple[Any, Tree]:
    """Calls the module; returns its output and its state after the call.

    Args:
      params: all of its parameters, a nested dict of arrays of the structure of `shapes`.
      state: its state, of the structure of `state`.
      training: the mode of its norms and of whatever else has one.
      given: what the stack passes in a row: `(batch,)`, `(x,)` or `(x, batch)`.
      context: a layer's; its keys are those of the module's random streams.

    Raises:
      StackError: the call changes a variable that is no `nnx.BatchStat`, or makes one.
    """
    out, _, after = self.call_and_look(params, state, training, *given, context=context)
    if self.draws:
      # Traced before, by which it is known that all but statistics are as they were.
      after = jax.tree.map(lambda yes, new, old: new if yes else old, self.changing, after, state)
    else:
      jax.tree.map_with_path(self._check_kept, self.changing, state, after)
    return out, after

  def call_and_look(
    self,
    params: Tree,
    state: Tree,
    training: bool,
    *given: Any,
    context: Context | None = None,
  ) -> tuple[Any, Tree, Tree]:
    """Calls the module; returns its output, its parameters and its state as the call leaves them.

    Args:
      params, state, training, given, context: see `run`.
    """
    if context is not None and self.draws:
      # Before keys are made, which draw these shapes once.
      self.check_draws(len(context.rows))
      context.once = self.draws[0].once
    # A new module for every call: what the call changes in it is seen in what is returned, or lost.
    streams = self._fresh_streams(context)
    module = nnx.merge(self.graph, merged(merged(params, state), streams))
    set_mode(module, training)
    # Each device holds some rows of the microbatch. With statistics of these alone, outputs and
    # gradients would depend on the mesh.
    for _, inner in nnx.iter_graph(module):
      if isinstance(inner, nnx.BatchNorm) and inner.axis_name is None:
        # Asked for here alone: a module without norms may be traced off the mesh.
        # Along `sequence`, devices have other positions of the same rows.
        over = tuple(axis for axis in (*ROWS, SEQUENCE) if axes.size(axis) > 1) or None
        inner.axis_name = over  # type: ignore[assignment]  # `lax.pmean` takes several names
    batch = None if context is None else context.batch
    args, named = self.plan.arguments(training, given, context, batch)
    out = module(*args, **named)
    self._refuse_new_variables(module)
    all_after = nnx.to_pure_dict(nnx.state(module))
    after = _select(all_after, self.state)
    jax.tree.map_with_path(self._check_statistic, self.changing, state, after)
    return out, _select(all_after, self.shapes), after

  def check_draws(self, rows: int) -> None:
    """Refuses a number of rows for which two unlike draws of the module have one shape.

    Args:
      rows: of a microbatch on one device.

    Raises:
      StackError: names the module, the shape and the rows.
    """
    clash = self.draws[0].clash(rows) if self.draws else None
    if clash is not None:
      raise StackError(
        f"{self.name} ({self.label}) draws random numbers of shape {list(clash)} for all rows at"
        f" once, and for a device's {rows} rows of a microbatch one by one, which cannot be told"
        " apart: give a device another number of rows (microbatches=, or the size of data)"
      )

  def _fresh_streams(self, context: Context | None) -> Tree:
    """Keys and counts for the module's random streams, those of this call."""
    if not self.streams:
      return {}
    assert context is not None  # only layers keep streams
    number = iter(range(len(jax.tree.leaves(self.streams))))
    return jax.tree.map(lambda leaf: context.stream(next(number), leaf), self.streams)

  def _refuse_new_variables(self, module: nnx.Module) -> None:
    """Refuses variables that a call has made; what `sow` keeps to be looked at is dropped.

    Raises:
      StackError: names the variable and its type.
    """
    known = len(jax.tree.leaves((self.shapes, self.state, self.streams)))
    flat = nnx.to_flat_state(nnx.state(module))
    if len(flat) == known:
      return
    for path, variable in flat:
      at = "/".join(map(str, path))
      if issubclass(variable.type, nnx.Intermediate) or any(
        get_path(tree, at) is not None for tree in (self.shapes, self.state, self.streams)
      ):
        continue
      raise StackError(
        f"{self.name} ({self.label}) makes the variable {at} ({variable.type.__name__}) in its"
        " call, which nothing in a pipeline would read: make it in __init__, return it as part of"
        " x, or sow it as an nnx.Intermediate, which is dropped"
      )

  def _check_statistic(self, path: Any, changes: bool, before: Any, after: Any) -> None:
    """Refuses a statistic that becomes an array of another shape, or of whole numbers or floats.

    Floats are averaged and of whole numbers the largest is kept, by what the call makes of them.

    Raises:
      StackError: names the variable, what it was and what it becomes.
    """
    if not changes:
      return
    was, now = (f"{jnp.result_type(v)}{list(jnp.shape(v))}" for v in (before, after))
    floats = [jnp.issubdtype(jnp.result_type(v), jnp.inexact) for v in (before, after)]
    if jnp.shape(before) != jnp.shape(after) or floats[0] != floats[1]:
      raise StackError(
        f"{self.name} ({self.label}) makes its statistic {jax.tree_util.keystr(path)} {now}, which"
        f" was {was}: assign it by variable[...] = value, which keeps shape and dtype, or make it"
        " such an array in __init__"
      )

  def _check_kept(self, path: Any, changes: bool, before: Any, after: Any) -> None:
    """Refuses a change of a variable that is no statistic: only these are averaged over a step.

    A variable that the call has not assigned still holds the very object that was put in.
    """
    if not changes and after is not before:
      raise StackError(
        f"{self.name} changes its variable {jax.tree_util.keystr(path)}, which is no nnx.BatchStat:"
        " derive its type from nnx.BatchStat, and return the mean over microbatches by it"
      )

  def call(self, method: str, params: Tree, *args: Any) -> Any:
    """Calls another method of the module than `__call__`, with its parameters and no state."""
    return getattr(self.build(params, {}), method)(*args)

  def require(self, *methods: str) -> None:
    """Raises StackError where the module lacks a method that a cut vocabulary calls."""
    for method in methods:
      if not callable(getattr(self.kind, method, None)):
        raise StackError(
          f"{self.name} has no method {method}, which a vocabulary cut over the stages needs; add"
          " it (see `jaxpipe.Tables`), or use a schedule whose last stage holds the whole head"
        )

  def same_kind(self, other: ModuleSpec) -> bool:
    """Whether both have the same static graph and call, and variables of the same shapes."""
    return (
      self.graph == other.graph
      and self.plan.kinds == other.plan.kinds
      and self.same_variables(other)
    )

  def same_variables(self, other: ModuleSpec) -> bool:
    """Whether both have parameters, state and streams of the same shapes."""
    own = (self.shapes, self.state, self.streams)
    return same_shapes(own, (other.shapes, other.state, other.streams))


def _refuse_dtypes(where: str, shapes: Tree) -> None:
  """Refuses parameters of dtypes that no gradient has, or that none is summed in.

  Raises:
    StackError: names the module, the parameter and its dtype.
  """
  for at, leaf in jax.tree.leaves_with_path(shapes):
    parameter = f"{where}: parameter {jax.tree_util.keystr(at)} is {leaf.dtype}"
    # A whole number that is trained would have a gradient of JAX's dtype float0.
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      raise StackError(
        f"{parameter}, which has no gradient; make it a float, or compute it in __call__"
      )
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or leaf.dtype.itemsize < 2:
      raise StackError(
        f"{parameter}, and parameters are float16, bfloat16, float32 or float64: keep one of these"
        " and convert it in __call__ (a complex one as two, its real and its imaginary part)"
      )


def _is_linen(factory: Any) -> bool:
  """Whether a Linen module, or the class of one, was given as a factory."""
  return isinstance(factory, nn.Module) or (
    isinstance(factory, type) and issubclass(factory, nn.Module)
  )


def _select(tree: Tree, like: Tree) -> Tree:
  """The leaves of a nested dict at the paths of another."""
  if not isinstance(like, Mapping):
    return tree
  return {name: _select(tree[name], inner) for name, inner in like.items()}


def sums(out: Any) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
  """Arranges what a head returns as `value_and_grad(has_aux=True)` wants it, and checks it.

  Args:
    out: `(loss_sum [], weight [], metrics)`.

  Returns:
    `loss_sum, (weight, metrics)`; weight and metrics have no gradient.

  Raises:
    StackError: it is not `(loss_sum, weight, metrics)`, or a sum is no scalar.
  """
  if not isinstance(out, tuple) or len(out) != 3:
    raise StackError(f"head must return (loss_sum, weight, metrics); it returns {type(out)}")
  loss_sum, weight, metrics = out
  if not jnp.issubdtype(jnp.result_type(loss_sum), jnp.floating):
    raise StackError(
      f"loss_sum is {jnp.result_type(loss_sum)}, which has no gradient; return a real float"
    )
  if jnp.shape(loss_sum) or jnp.shape(weight):
    raise StackError(
      f"head must return scalar sums; loss_sum has shape {jnp.shape(loss_sum)},"
      f" weight {jnp.shape(weight)}: sum over the rows"
    )
  return loss_sum, jax.lax.stop_gradient((weight, metrics))


def _set(tree: Tree, path: tuple[Any, ...], value: Any) -> None:
  """Sets a leaf of a nested dict in place."""
  for name in path[:-1]:
    tree = tree[name]
  tree[path[-1]] = value


def same_shapes(a: Tree, b: Tree) -> bool:
  """Whether two trees have the same structure, and their leaves the same shapes and dtypes."""
  if not same_structure(a, b):
    return False
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)


def same_structure(a: Tree, b: Tree) -> bool:
  """Whether two trees differ in nothing but their leaves."""
  # As an object: to mypy, JAX's tree structures have no `==`.
  structure: object = jax.tree.structure(a)
  return structure == jax.tree.structure(b)
