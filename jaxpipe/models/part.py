"""One module as data: its static graph, and the shapes of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

Tree = Any
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)

Factory = Callable[[nnx.Rngs], nnx.Module]


class StackError(ValueError):
  """The factories do not form a stack that can be pipelined."""


@dataclasses.dataclass(frozen=True)
class Part:
  """One module as data: its static graph and the shapes of its parameters.

  Attributes:
    name: how messages call it, such as `layers[3]`.
    factory: builds it from `nnx.Rngs`.
    graph: the static half of `nnx.split`.
    shapes: nested dict of `jax.ShapeDtypeStruct`, the trainable half.
    kind: the module's class.
  """

  name: str
  factory: Factory
  graph: Any
  shapes: Tree
  kind: type

  @classmethod
  def trace(cls, name: str, factory: Factory) -> Part:
    """Builds the module abstractly (no arrays) and refuses what cannot be pipelined."""
    if _is_linen(factory):
      raise StackError(
        f"{name} is a Linen module; wrap it: jaxpipe.linen(Module(), example inputs ...)"
      )
    module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
    for path, value in nnx.iter_graph(module):
      if not isinstance(value, nnx.Variable) and isinstance(value, _ARRAYS):
        raise StackError(
          f"{name} holds the array {'/'.join(map(str, path))} outside any nnx.Param: compute it in"
          " __call__, or make it a module-level constant"
        )
    graph, state = nnx.split(module)
    for path, variable in nnx.to_flat_state(state):
      if not issubclass(variable.type, nnx.Param):
        raise StackError(_state_message(name, path, variable.type))
    shapes = nnx.to_pure_dict(state)
    for at, leaf in jax.tree.leaves_with_path(shapes):
      if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise StackError(
          f"{name}: parameter {jax.tree_util.keystr(at)} is {leaf.dtype}, which has no gradient;"
          " make it a float, or compute it in __call__"
        )
    return cls(name, factory, graph, shapes, type(module))

  def init(self, key: jax.Array) -> Tree:
    """Returns fresh parameters, a nested dict of arrays."""
    return fresh(self.factory, key)

  def __call__(self, params: Tree, *args: Any) -> Any:
    return nnx.merge(self.graph, params)(*args)

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

  def same_kind(self, other: Part) -> bool:
    """Whether both have the same static graph and the same parameter shapes and dtypes."""
    if not same_structure(self.shapes, other.shapes):
      return False
    pairs = zip(jax.tree.leaves(self.shapes), jax.tree.leaves(other.shapes), strict=True)
    return self.graph == other.graph and all(
      (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs
    )


def _is_linen(factory: Any) -> bool:
  """Whether it is a Linen module, or the class of one."""
  return isinstance(factory, nn.Module) or (
    isinstance(factory, type) and issubclass(factory, nn.Module)
  )


def fresh(factory: Factory, key: jax.Array) -> Tree:
  """Fresh parameters of one module, a nested dict of arrays."""
  return nnx.to_pure_dict(nnx.state(factory(nnx.Rngs(key)), nnx.Param))


def _state_message(name: str, path: tuple[Any, ...], kind: type) -> str:
  where = "/".join(map(str, path))
  if issubclass(kind, nnx.RngState):
    remedy = "call context.dropout(x, rate) in place of nnx.Dropout, and keep no rngs in modules"
  elif issubclass(kind, nnx.BatchStat):
    remedy = "use a norm without running statistics (RMSNorm, LayerNorm, GroupNorm)"
  else:
    remedy = "make it an nnx.Param, or recompute it in __call__"
  return (
    f"{name} holds mutable state {where} ({kind.__name__}), which is not supported yet: {remedy}"
  )


def same_structure(a: Tree, b: Tree) -> bool:
  """Whether two trees differ in nothing but their leaves."""
  one: object = jax.tree.structure(a)
  return one == jax.tree.structure(b)
