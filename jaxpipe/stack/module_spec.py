"""One module as data: its static graph, and the shapes of its parameters and of its state.

A Flax NNX module is an object that holds its variables. The pipeline wants pure functions of trees
that it can place, cut and pack, so that a module is taken apart once, before anything is allocated,
and put together again inside every call:

    factory --trace--> ModuleSpec (graph, shapes)       no arrays
    graph + parameters + state --run--> output, state   inside a traced function

*Parameters* are what is trained. All other variables are *model state*: running statistics, which a
forward in training changes, and weights that are frozen, which nothing changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.errors import FlaxError

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import ROWS
from jaxpipe.stack.paths import merged

Tree = Any
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)

# Builds a module, fresh values included.
Factory = Callable[[nnx.Rngs], nnx.Module]


class StackError(ValueError):
  """The modules do not form a stack that can be pipelined, or not as they are asked to."""


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
  """A Flax module taken apart: static graph, parameter shapes, state shapes.

  Attributes:
    name: how messages name it by its place, `embed`, `layers[3]` or `head`.
    factory: builds the module from `nnx.Rngs`.
    trainable: NNX filter of the variables that are parameters.
    graph: the static half of `nnx.split`: all of the module but the values of its variables.
    shapes: the parameters, a nested dict of `jax.ShapeDtypeStruct`s.
    state: all other variables, a nested dict of `jax.ShapeDtypeStruct`s.
    changing: a dict of the structure of `state`, True for what a forward in training may change:
      variables of type `nnx.BatchStat`, or of one derived from it.
    kind: the module's class.
    label: how messages name the class: its own `label` where it has one, as a wrapped Linen module
      does, else the name of its class.
  """

  name: str
  factory: Factory
  trainable: Any
  graph: Any
  shapes: Tree
  state: Tree
  changing: Tree
  kind: type
  label: str

  @classmethod
  def trace(cls, name: str, factory: Factory, trainable: Any = nnx.Param) -> ModuleSpec:
    """Builds the module abstractly, without arrays, and refuses what cannot be pipelined.

    Args:
      name: how messages name the module.
      factory: builds it.
      trainable: NNX filter of the variables that are parameters.

    Raises:
      StackError: an unwrapped Linen module, an array outside variables, a random stream of the
        module's own, or a parameter that has no gradient.
    """
    if _is_linen(factory):
      raise StackError(
        f"{name} is a Linen module; wrap it: jaxpipe.linen(Module(), example inputs ...)"
      )
    module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
    _refuse_flags(name, type(module))
    for path, value in nnx.iter_graph(module):
      if not isinstance(value, nnx.Variable) and isinstance(value, _ARRAYS):
        raise StackError(
          f"{name} holds the array {'/'.join(map(str, path))} outside any nnx.Param: compute it in"
          " __call__, or make it a module-level constant"
        )
    graph, params, state = split_module(module, trainable)
    for path, variable in nnx.to_flat_state(state):
      if issubclass(variable.type, nnx.RngState):
        raise StackError(
          f"{name} holds mutable state {'/'.join(map(str, path))} ({variable.type.__name__}), a"
          " random stream of its own, which no schedule could repeat: call"
          " context.dropout(x, rate) in place of nnx.Dropout, and keep no rngs in modules"
        )
    shapes = nnx.to_pure_dict(params)
    # A whole number that is trained would have a gradient of JAX's dtype float0.
    for at, leaf in jax.tree.leaves_with_path(shapes):
      if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise StackError(
          f"{name}: parameter {jax.tree_util.keystr(at)} is {leaf.dtype}, which has no gradient;"
          " make it a float, or compute it in __call__"
        )
      if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or leaf.dtype.itemsize < 2:
        raise StackError(
          f"{name}: parameter {jax.tree_util.keystr(at)} is {leaf.dtype}, and parameters are"
          " float16, bfloat16, float32 or float64: keep one of these and convert it in __call__"
          " (a complex one as two, its real and its imaginary part)"
        )
    changing = nnx.to_pure_dict(state)
    for path, variable in nnx.to_flat_state(state):
      _set(changing, path, issubclass(variable.type, nnx.BatchStat))
    return cls(
      name=name,
      factory=factory,
      trainable=trainable,
      graph=graph,
      shapes=shapes,
      state=nnx.to_pure_dict(state),
      changing=changing,
      kind=type(module),
      label=str(getattr(module, "label", type(module).__name__)),
    )

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Returns fresh parameters, tied leaves included, and fresh state: nested dicts of arrays."""
    _, params, state = split_module(self.factory(nnx.Rngs(key)), self.trainable)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

  @functools.cached_property
  def argument_count(self) -> int:
    """How many arguments the module is called with: a layer may do without its context."""
    return count_arguments(self.kind)

  def run(self, params: Tree, state: Tree, training: bool, *args: Any) -> tuple[Any, Tree]:
    """Calls the module; returns its output and its state after the call.

    Args:
      params: all of its parameters, a nested dict of arrays of the structure of `shapes`.
      state: its state, of the structure of `state`.
      training: the mode of its norms and of whatever else has one.
      args: what it is called with; those beyond `argument_count` are left out.

    Raises:
      StackError: the call changes a variable that is no `nnx.BatchStat`.
    """
    # A new module for every call: what the call changes in it is seen in what is returned, or lost.
    module = nnx.merge(self.graph, merged(params, state))
    if training:
      module.train()
    else:
      module.eval()
    # Each device holds some rows of the microbatch. With statistics of these alone, outputs and
    # gradients would depend on the mesh.
    for _, inner in nnx.iter_graph(module):
      if isinstance(inner, nnx.BatchNorm) and inner.axis_name is None:
        # Asked for here alone: a module without norms may be traced off the mesh.
        over = tuple(axis for axis in ROWS if axes.size(axis) > 1) or None
        inner.axis_name = over  # type: ignore[assignment]  # `lax.pmean` takes several names
    out = module(*args[: self.argument_count])
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(self.trainable)))
    jax.tree.map_with_path(self._check_kept, self.changing, state, after)
    return out, after

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
    return getattr(nnx.merge(self.graph, params), method)(*args)

  def require(self, *methods: str) -> None:
    """Raises StackError where the module lacks a method that a cut vocabulary calls."""
    for method in methods:
      if not callable(getattr(self.kind, method, None)):
        raise StackError(
          f"{self.name} has no method {method}, which a vocabulary cut over the stages needs; add"
          " it (see `jaxpipe.Tables`), or use a schedule whose last stage holds the whole head"
        )

  def same_kind(self, other: ModuleSpec) -> bool:
    """Whether both have the same static graph, and parameters and state of the same shapes."""
    own, others = (self.shapes, self.state), (other.shapes, other.state)
    return self.graph == other.graph and same_shapes(own, others)


# Errors of a module that is called with arguments it cannot take; any other is let through.
_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, AssertionError, FlaxError)


@contextlib.contextmanager
def called(name: str, x: Tree, cannot: str = "cannot be called with") -> Iterator[None]:
  """Turns errors of shapes and types in a call into a StackError that says whose call it was.

  Args:
    name: of the module, as messages name it.
    x: what it was called with, arrays or shapes; the message gives their dtypes and shapes.
    cannot: what it cannot, for the message.
  """
  try:
    yield
  except StackError:
    raise
  except _MISTAKES as error:
    given = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", x)
    # Messages of JAX and Flax have many lines, of which the first say what is wrong.
    said = " ".join(str(error).split())
    kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
    raise StackError(f"{name} {cannot} {given}: {kind}{said[:300]}") from error


def count_arguments(kind: type, given_by_name: Container[str] = ()) -> int:
  """How many positional arguments a module is called with.

  It counts the parameters of its call that have no default, and those named `context` or `batch`,
  which the stack gives whether or not they have one; but at least one, x, also to `*args`.

  Args:
    kind: the module's class.
    given_by_name: names of parameters that are passed by name, and do not count.
  """
  call: Any = kind.__call__
  # Of the class's function, whose first parameter is `self`.
  parameters = list(inspect.signature(call).parameters.values())[1:]
  kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  positional = [p for p in parameters if p.kind in kinds and p.name not in given_by_name]
  return max(1, sum(p.default is p.empty or p.name in ("context", "batch") for p in positional))


def _refuse_flags(name: str, kind: type) -> None:
  """Refuses a module whose call takes a training flag: it would be given its context in that place.

  Raises:
    StackError: names the module and the flag.
  """
  call: Any = kind.__call__
  # The first two are `self` and x.
  for parameter in list(inspect.signature(call).parameters.values())[2:]:
    if parameter.default is parameter.empty and parameter.name in ("train", "training"):
      raise StackError(
        f"{name} ({kind.__name__}) must be told {parameter.name}, and an NNX module is not: its"
        f" norms know by themselves, and context.training says it; take x and context"
      )


def _is_linen(factory: Any) -> bool:
  """Whether a Linen module, or the class of one, was given as a factory."""
  return isinstance(factory, nn.Module) or (
    isinstance(factory, type) and issubclass(factory, nn.Module)
  )


def split_module(module: nnx.Module, trainable: Any) -> tuple[Any, Any, Any]:
  """The module's static half, its parameters and all its other variables."""
  graph, params, *others = nnx.split(module, trainable, ...)
  return graph, params, others[0]


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
