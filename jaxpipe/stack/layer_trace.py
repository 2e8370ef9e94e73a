"""Walks the shapes of a batch through modules, and looks at what each computes on the way.

Nothing is computed: every module is traced once on the shapes that the one before returns. From the
trace is read what a module takes from outside, which variables it changes, and what it draws:

    batch -> embed -> x -> layers/0 -> x ... -> head -> loss_sum, weight, metrics
             |             |                    |
             weights from outside, changes that would be lost, draws that no mesh repeats

What is drawn for rows is told from what is drawn once by a second trace, of a batch with one row
more; it is made only where a module draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.stack.context import Context, LayerInputs, leaves_of_rows, map_entries, rows_alone
from jaxpipe.stack.errors import StackError, called
from jaxpipe.stack.module.captured import refuse_captured
from jaxpipe.stack.module.jaxprs import passed_through
from jaxpipe.stack.module.row_keys import Draws, draws_any, draws_of
from jaxpipe.stack.module_spec import ModuleSpec, sums

Tree = Any


class ShapeWalk:
  """The shapes of x on their way through the modules of a stack.

  Attributes:
    x: shapes of what the last module returned; None before the embedding.
  """

  def __init__(self, batch: Tree, x: Tree = None, more: Callable[[], Tree] = lambda: None) -> None:
    """Begins before the embedding, or behind it.

    Args:
      batch: arrays or shapes, leaves [B, ...].
      x: what the embedding returns.
      more: the same for a batch of one row more, computed only where it is asked for.
    """
    self.x = x
    self._batch, self._more = batch, more

  @functools.cached_property
  def rows(self) -> int:
    """B, rows of the batch."""
    return rows_of(self._batch)

  @functools.cached_property
  def batch_of_more(self) -> Tree:
    """Shapes of a batch of one row more."""

    def one_more(leaf: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((leaf.shape[0] + 1, *leaf.shape[1:]), leaf.dtype)

    return map_entries(one_more, lambda entry: entry, self._batch)

  def through(self, spec: ModuleSpec) -> Tree:
    """Traces a module on the current x, and returns the shapes of what it returns.

    Args:
      spec: the embedding, a layer or the head.

    Raises:
      StackError: it raises an error of shapes or types; it reads weights that are no variables of
        it; it changes a variable that is no statistic; or it draws random numbers that would depend
        on the mesh.
    """
    where = spec.name if spec.name in ("embed", "head") else f"{spec.name} ({spec.label})"
    args = (spec.shapes, spec.state, self.x, self._batch)
    with called(where, self._batch if spec.name == "embed" else self.x):
      call = functools.partial(_watched, spec, self.rows)
      jaxpr, (y, *_) = jax.make_jaxpr(call, return_shape=True)(*args)
      if any(jax.tree.leaves(spec.changing)):
        # A module may fail in evaluation alone, such as a norm that goes on to change its averages.
        jax.eval_shape(module_call(spec, self.rows, training=False), *args)
    refuse_captured(where, jaxpr)
    _refuse_changes(spec, where, jaxpr, len(jax.tree.leaves(y)))
    before = self._more

    def more(call: Callable[..., Tree]) -> Tree:
      return call(spec.shapes, spec.state, before(), self.batch_of_more)

    if not spec.draws:
      draws = Draws()
      if draws_any(jaxpr):
        larger = more(jax.make_jaxpr(module_call(spec, self.rows + 1)))
        draws = draws_of(jaxpr, larger, self.rows, where)
      spec.draws.append(draws)
    of_more = functools.partial(jax.eval_shape, module_call(spec, self.rows + 1))
    self.x, self._more = y, functools.cache(functools.partial(more, of_more))
    return y

  def refuse_draws(self, name: str, function: Callable[[Tree, Tree], Any]) -> None:
    """Refuses a function of `(x, batch)` that draws random numbers for rows.

    Raises:
      StackError: names the function.
    """

    def call(x: Tree, batch: Tree) -> Any:
      return function(x, rows_alone(batch))

    jaxpr = jax.make_jaxpr(call)(self.x, self._batch)
    if draws_any(jaxpr):
      larger = jax.make_jaxpr(call)(self._more(), self.batch_of_more)
      draws_of(jaxpr, larger, self.rows, name)


def module_call(spec: ModuleSpec, rows: int, training: bool = True) -> Callable[..., Tree]:
  """A module's call, `(params, state, x, batch) -> y`, for so many rows."""

  def call(params: Tree, state: Tree, x: Tree, batch: Tree) -> Tree:
    given, context = _given(spec, rows, training, x, batch)
    out = spec.run(params, state, training, *given, context=context)[0]
    return sums(out) if spec.name == "head" else out

  return call


def _watched(
  spec: ModuleSpec, rows: int, params: Tree, state: Tree, x: Tree, batch: Tree
) -> tuple[Tree, Tree, Tree]:
  """What a module returns in training, and its parameters and state after the call."""
  given, context = _given(spec, rows, True, x, batch)
  out, params, state = spec.call_and_look(params, state, True, *given, context=context)
  return (sums(out) if spec.name == "head" else out), params, state


def _given(
  spec: ModuleSpec, rows: int, training: bool, x: Tree, batch: Tree
) -> tuple[tuple[Tree, ...], Context | None]:
  """The arguments that a stack passes in a row, and the context of a layer."""
  if spec.name == "embed":
    return (rows_alone(batch),), None
  if spec.name == "head":
    return (x, rows_alone(batch)), None
  key, number = jax.random.key(0) if training else None, jnp.int32(0)
  inputs = LayerInputs(batch=batch, key=key, layer=number, microbatch=number, rows=jnp.arange(rows))
  return (x,), Context.create(training, **inputs)


def _refuse_changes(spec: ModuleSpec, where: str, jaxpr: Any, outputs: int) -> None:
  """Refuses a call after which a variable that is no statistic is another one.

  Args:
    spec: the module.
    where: how messages name it.
    jaxpr: of `_watched`.
    outputs: leaves of what the module returns, which stand before its variables.

  Raises:
    StackError: names the variable.
  """
  before = jax.tree.leaves_with_path((spec.shapes, spec.state))
  may = jax.tree.leaves((jax.tree.map(lambda _: False, spec.shapes), spec.changing))
  came = passed_through(jaxpr)[outputs:]
  for n, ((path, _), changes, source) in enumerate(zip(before, may, came, strict=True)):
    if not changes and source != n:
      raise StackError(
        f"{where} changes its variable {jax.tree_util.keystr(path[1:])}, and the change would be"
        " lost: only statistics, of a type derived from nnx.BatchStat, change, by the mean over"
        " microbatches"
      )


def rows_of(batch: Tree) -> int:
  """Rows of a batch, which x cannot tell: it may have leaves without rows, such as a scalar loss.

  Raises:
    StackError: the batch has no leaves with rows.
  """
  for _, leaf in leaves_of_rows(batch):
    return int(jnp.shape(leaf)[0])
  raise StackError("no leaf of the batch has rows; give it one that is [B, ...]")
