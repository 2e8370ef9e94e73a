"""One module as data: its static graph, and the shapes of its parameters and of its state.

Parameters are what is trained. All other variables are *state*: running statistics, which a forward
in training changes, and weights that are frozen, which nothing changes.
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

Factory = Callable[[nnx.Rngs], nnx.Module]


class StackError(ValueError):
  """The factories do not form a stack that can be pipelined."""


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
  """One module as data.

  Attributes:
    name: how messages call it, such as `layers[3]`.
    factory: builds it from `nnx.Rngs`.
    trainable: filter of the variables that are parameters.
    graph: the static half of `nnx.split`.
    shapes: nested dict of `jax.ShapeDtypeStruct`, the parameters.
    state: nested dict of them, all other variables.
    changing: of `state`, True for what a forward in training may change: variables of type
      `nnx.BatchStat`, or of one derived from it.
    kind: the module's class.
    label: the class, as messages name it.
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
    """Builds the module abstractly (no arrays) and refuses what cannot be pipelined."""
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
    for at, leaf in jax.tree.leaves_with_path(shapes):
      if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise StackError(
          f"{name}: parameter {jax.tree_util.keystr(at)} is {leaf.dtype}, which has no gradient;"
          " make it a float, or compute it in __call__"
        )
    changing = nnx.to_pure_dict(state)
    for path, variable in nnx.to_flat_state(state):
      _set(changing, path, issubclass(variable.type, nnx.BatchStat))
    label = str(getattr(module, "label", type(module).__name__))
    kept = nnx.to_pure_dict(state)
    return cls(name, factory, trainable, graph, shapes, kept, changing, type(module), label)

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Returns fresh parameters and state, nested dicts of arrays."""
    return fresh(self.factory, key, self.trainable)

  @functools.cached_property
  def wanted(self) -> int:
    """How many arguments the module is called with: a layer may do without its context."""
    return wanted(self.kind)

  def run(self, params: Tree, state: Tree, training: bool, *args: Any) -> tuple[Any, Tree]:
    """Calls the module; returns its output and its state after the call.

    Statistics of `nnx.BatchNorm` are those of all rows of the microbatch, wherever they lie.

    Raises:
      StackError: the call changes a variable that is no `nnx.BatchStat`.
    """
    module = nnx.merge(self.graph, merged(params, state))
    if training:
      module.train()
    else:
      module.eval()
    over = tuple(axis for axis in ROWS if axes.size(axis) > 1)
    for _, one in nnx.iter_graph(module):
      if over and isinstance(one, nnx.BatchNorm) and one.axis_name is None:
        one.axis_name = over  # type: ignore[assignment]  # several names are as good as one
    out = module(*args[: self.wanted])
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(self.trainable)))
    jax.tree.map_with_path(self._check_kept, self.changing, state, after)
    return out, after

  def _check_kept(self, path: Any, changes: bool, before: Any, after: Any) -> None:
    if not changes and after is not before:
      raise StackError(
        f"{self.name} changes its variable {jax.tree_util.keystr(path)}, which is no nnx.BatchStat:"
        " derive its type from nnx.BatchStat, and return the mean over microbatches by it"
      )

  def call(self, method: str, params: Tree, *args: Any) -> Any:
    """Calls another method of the module."""
    return getattr(nnx.merge(self.graph, params), method)(*args)

  def require(self, *methods: str) -> None:
    """Raises StackError where the module lacks what a cut vocabulary calls."""
    for method in methods:
      if not callable(getattr(self.kind, method, None)):
        raise StackError(
          f"{self.name} has no method {method}, which a vocabulary cut over the stages needs; add"
          " it (see `jaxpipe.Tables`), or use a schedule whose last stage holds the whole head"
        )

  def same_kind(self, other: ModuleSpec) -> bool:
    """Whether both have the same static graph and the same parameter shapes and dtypes."""
    mine, theirs = (self.shapes, self.state), (other.shapes, other.state)
    return self.graph == other.graph and same_shapes(mine, theirs)


_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, AssertionError, FlaxError)


@contextlib.contextmanager
def called(name: str, x: Tree, cannot: str = "cannot be called with") -> Iterator[None]:
  """Errors of shapes and types in a call become a StackError: whose call, and what it was given."""
  try:
    yield
  except StackError:
    raise
  except _MISTAKES as error:
    given = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", x)
    said = " ".join(str(error).split())
    kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
    raise StackError(f"{name} {cannot} {given}: {kind}{said[:300]}") from error


def wanted(kind: type, told: Container[str] = ()) -> int:
  """Arguments that a module is called with: those it must be given or names as the stack does.

  Of `*args`, which say nothing, the first: modules in a row hand x on to one another.

  Args:
    kind: the module's class.
    told: names of those that it is given by name.
  """
  call: Any = kind.__call__
  parameters = list(inspect.signature(call).parameters.values())[1:]
  kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  positional = [p for p in parameters if p.kind in kinds and p.name not in told]
  return max(1, sum(p.default is p.empty or p.name in ("context", "batch") for p in positional))


def _refuse_flags(name: str, kind: type) -> None:
  """Refuses a call that must be told whether it trains: it would take its context for that."""
  call: Any = kind.__call__
  for parameter in list(inspect.signature(call).parameters.values())[2:]:
    if parameter.default is parameter.empty and parameter.name in ("train", "training"):
      raise StackError(
        f"{name} ({kind.__name__}) must be told {parameter.name}, and an NNX module is not: its"
        f" norms know by themselves, and context.training says it; take x and context"
      )


def _is_linen(factory: Any) -> bool:
  """Whether it is a Linen module, or the class of one."""
  return isinstance(factory, nn.Module) or (
    isinstance(factory, type) and issubclass(factory, nn.Module)
  )


def split_module(module: nnx.Module, trainable: Any) -> tuple[Any, Any, Any]:
  """The module's static half, its parameters and all its other variables."""
  graph, params, *others = nnx.split(module, trainable, ...)
  return graph, params, others[0]


def fresh(factory: Factory, key: jax.Array, trainable: Any = nnx.Param) -> tuple[Tree, Tree]:
  """Fresh parameters and state of one module, nested dicts of arrays."""
  _, params, state = split_module(factory(nnx.Rngs(key)), trainable)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def sums(out: Any) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
  """What a head returns, as `value_and_grad(has_aux=True)` wants it.

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
  one: object = jax.tree.structure(a)
  return one == jax.tree.structure(b)
