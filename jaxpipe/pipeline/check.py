"""Compares the pipeline with the unpipelined model, on the user's own stack, leaf by leaf.

`check` runs one step of both on the same parameters, batch and key, and reports how far apart each
gradient leaf, the loss, the metrics and the model state are. The pipeline runs with `poison`: its
buffers are full of NaN until an action writes them, so that no result may come from elsewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxpipe.parallel.placing import layer_paths, place, unplace
from jaxpipe.parallel.rules import describe
from jaxpipe.pipeline.executor import pipeline_value_and_grad
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.reference import reference_value_and_grad
from jaxpipe.pipeline.update.by_variable import by_variable
from jaxpipe.pipeline.update.variables import by_leaf
from jaxpipe.schedules import Schedule
from jaxpipe.stack.stack import LayerStack

Tree = Any

# Added to a report of too large errors that are not in float64, where they may come from rounding.
_ROUNDING = (
  "Where all else is equal, a leaf whose gradient is zero but for rounding (a bias before a norm)"
  " may be as far as this: with parameters and data in float64 the tolerance is 1e-12."
)


@dataclasses.dataclass(frozen=True)
class Report:
  """How far one step of the pipeline is from one of the reference; printed, a line per leaf.

  Attributes:
    errors: path of a gradient leaf, as `jax.tree_util.keystr` writes it -> its error, which for a
      leaf g of the pipeline and r of the reference is max|g - r| divided by max|r|, or by a
      thousandth of the largest max|r| of any leaf if that is more. NaN counts as infinite.
    loss_error: relative error of the loss.
    metrics_error: largest relative error of a metric; 0 where there are no metrics.
    state_errors: path of a leaf of the model state after the step -> its error, by the measure of
      `errors`; empty where the stack has no state.
    tolerance: the largest error that `ok` allows.
    update_errors: path of a variable -> error of its value after two updates of the optimizer that
      was given, by the measure of `errors` of what they have added to it; empty without one.
  """

  errors: dict[str, float]
  loss_error: float
  metrics_error: float
  state_errors: dict[str, float]
  tolerance: float
  update_errors: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def worst(self) -> float:
    """The largest error of all gradients, the state, the updates, the loss and the metrics."""
    others = [*self.state_errors.values(), *self.update_errors.values()]
    return max([*self.errors.values(), *others, self.loss_error, self.metrics_error])

  @property
  def ok(self) -> bool:
    """Whether no error is larger than the tolerance."""
    return self.worst <= self.tolerance

  def __str__(self) -> str:
    lines = [f"{error:10.2e}  {path}" for path, error in self.errors.items()]
    verdict = "ok" if self.ok else "NOT EQUAL"
    lines += [f"{error:10.2e}  state{path}" for path, error in self.state_errors.items()]
    lines += [f"{error:10.2e}  update of {path}" for path, error in self.update_errors.items()]
    lines += [
      f"{self.loss_error:10.2e}  loss",
      f"{self.metrics_error:10.2e}  metrics",
      f"{verdict}: worst {self.worst:.2e}, allowed {self.tolerance:.0e}",
      *([] if self.ok or self.tolerance < 1e-9 else [_ROUNDING]),
    ]
    return "\n".join(lines)


def leaf_errors(grads: Tree, reference: Tree) -> dict[str, float]:
  """Returns the error of every leaf, by the measure of `Report.errors`.

  Args:
    grads: arrays of any tree.
    reference: the arrays to compare with, in a tree of the same structure and shapes.

  Returns:
    Path of a leaf, as `jax.tree_util.keystr` writes it -> error, in the order of the tree.
  """
  got, want = jax.tree.map(_as_float, (_fetched(grads), _fetched(reference)))
  pairs = list(zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True))
  largest = max((float(np.abs(r).max(initial=0)) for (_, r), _ in pairs), default=0.0)
  # A gradient that is zero by mathematics, such as that of an attention key's bias, is rounding
  # alone: measured against itself, it would look like a failure.
  floor = max(1e-3 * largest, np.finfo(np.float64).tiny)
  return {
    jax.tree_util.keystr(path): _no_nan(
      np.abs(g - r).max(initial=0) / max(np.abs(r).max(initial=0), floor)
    )
    for (path, r), g in pairs
  }


def _fetched(tree: Tree) -> Tree:
  """The arrays of a tree in NumPy, whole, also those of which other processes have parts."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def fetch(leaf: Any) -> np.ndarray:
    there = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    whole = multihost_utils.process_allgather(leaf, tiled=True) if there else leaf
    return np.asarray(whole)

  return jax.tree.map(fetch, tree)


def _as_float(leaf: np.ndarray) -> np.ndarray:
  """A leaf in floating point: bools have no difference, and that of unsigned integers may wrap."""
  return leaf if np.issubdtype(leaf.dtype, np.inexact) else leaf.astype(float)


def _no_nan(error: Any) -> float:
  """The error, infinite for NaN: Python's `max` and `<=` would pass over a NaN in silence."""
  return float("inf") if np.isnan(error) else float(error)


def _relative(got: Any, want: Any) -> float:
  """The largest relative error of any element of two arrays of one shape."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  scale = np.maximum(np.abs(want), np.finfo(np.float64).tiny)
  return _no_nan(np.max(np.abs(got - want) / scale, initial=0))


def check(
  stack: LayerStack,
  schedule: Schedule,
  mesh: Mesh,
  batch: Tree,
  *,
  params: Tree | None = None,
  state: Tree | None = None,
  key: jax.Array | None = None,
  residuals: str | Policy = AUTO,
  slack: int = 0,
  unroll: str = "auto",
  tolerance: float | None = None,
  optimizer: optax.GradientTransformation | None = None,
) -> Report:
  """Runs one step of pipeline and reference on the same values and compares every leaf.

  The reference holds the whole model, and its gradients, on one device; of several processes, on
  one of each.

  Args:
    stack: the network.
    schedule: that the pipeline follows; its number of microbatches is also the reference's.
    mesh: of the pipeline, with an axis `stage` of `schedule.devices`.
    batch: arrays `[B, ...]`; of several processes each has all of them, in NumPy.
    params: canonical tree; default, `stack.init(key, batch)`.
    state: canonical tree of the model state; default, `stack.init_state(key, batch)`. Not read
      where the stack has no state.
    key: PRNG key of dropout, and of the defaults of `params` and `state`; default, key 0.
    residuals: what F keeps in the pipeline; see `pipeline_value_and_grad`. The reference keeps
      everything.
    slack: ticks that a transfer may take beyond its own.
    unroll: shape of the pipeline's program; see `pipeline_value_and_grad`.
    tolerance: the largest error that `Report.ok` allows; default, by the least precise parameter:
      1e-12 for float64, 1e-5 for float32, else 1e-2.
    optimizer: an optax transformation. Two updates of it, of the reference's gradients, are done by
      `by_variable` on placed trees and by itself on one leaf per variable, and compared.

  Returns:
    A `Report`; print it for a line per leaf.

  Raises:
    ValueError: as `pipeline_value_and_grad` does.
  """
  key = jax.random.key(0, impl="threefry2x32") if key is None else key
  params = stack.init(key, batch) if params is None else params
  options: dict[str, Any] = dict(residuals=residuals, slack=slack, unroll=unroll)
  step = pipeline_value_and_grad(stack, schedule, mesh, **options, poison=True)
  # Microbatches that skip stages skip their layers in the reference.
  paths = layer_paths(stack.depth, schedule) if schedule.paths else None
  reference = reference_value_and_grad(stack, schedule.microbatches, paths=paths)
  given: tuple[Tree, ...] = ()
  if stack.has_state:
    given = (stack.init_state(key, batch) if state is None else state,)
  placed = (place(tree, stack, schedule, mesh) for tree in given)
  after: list[Tree]
  true_after: list[Tree]
  (loss, metrics, *after), grads = step(place(params, stack, schedule, mesh), batch, key, *placed)
  (true_loss, true_metrics, *true_after), true_grads = reference(params, batch, key, *given)
  # A stack without state returns none from either.
  states = (unplace(after[0], stack, schedule), true_after[0]) if after else ({}, {})
  if tolerance is None:
    coarsest = min((leaf.dtype.itemsize for leaf in jax.tree.leaves(params)), default=4)
    tolerance = {8: 1e-12, 4: 1e-5}.get(coarsest, 1e-2)
  updates = {}
  if optimizer is not None:
    updates = _update_errors(optimizer, stack, schedule, mesh, params, true_grads)
  pairs = zip(jax.tree.leaves(metrics), jax.tree.leaves(true_metrics), strict=True)
  return Report(
    errors=leaf_errors(unplace(grads, stack, schedule), true_grads),
    loss_error=_relative(loss, true_loss),
    metrics_error=max([0.0, *(_relative(got, want) for got, want in pairs)]),
    state_errors=leaf_errors(*states),
    tolerance=tolerance,
    update_errors=updates,
  )


def _update_errors(
  tx: optax.GradientTransformation,
  stack: LayerStack,
  schedule: Schedule,
  mesh: Mesh,
  params: Tree,
  grads: Tree,
) -> dict[str, float]:
  """Error of what two updates add to each variable, on placed trees and on one leaf per variable.

  Args:
    tx: the transformation.
    stack, schedule, mesh: where the placed trees lie.
    params, grads: canonical trees.
  """

  def moved(tx: Any, params: Tree, grads: Tree) -> Tree:
    """The sum of two updates."""
    state, new = tx.init(params), params
    for _ in range(2):
      updates, state = tx.update(grads, state, new)
      new = optax.apply_updates(new, updates)
    return jax.tree.map(lambda a, b: a - b, new, params)

  placed = (place(tree, stack, schedule, mesh) for tree in (params, grads))
  ours = moved(by_variable(tx, stack, schedule, mesh), *placed)
  plain = moved(tx, by_leaf(stack, params), by_leaf(stack, grads))
  errors = leaf_errors(by_leaf(stack, unplace(ours, stack, schedule)), plain)
  paths = [describe(path) for path, _ in jax.tree.leaves_with_path(plain)]
  return dict(zip(paths, errors.values(), strict=True))
