"""The oracle, on the user's own stack: how far is the pipeline from the unpipelined model?"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.parallel.placing import layer_paths, place, unplace
from jaxpipe.pipeline.executor import pipeline_value_and_grad
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.reference import reference_value_and_grad
from jaxpipe.schedules import Schedule

Tree = Any

# What a report of too large errors says where they may be rounding's.
_ROUNDING = (
  "Where all else is equal, a leaf whose gradient is zero but for rounding (a bias before a norm)"
  " may be as far as this: with parameters and data in float64 the tolerance is 1e-12."
)


@dataclasses.dataclass(frozen=True)
class Report:
  """How far each gradient leaf of the pipeline is from the reference.

  Attributes:
    errors: leaf path -> max|g - r| / max(max|r|, 1e-3 * the largest max|r| of any leaf).
    loss_error: relative error of the loss.
    metrics_error: largest relative error of a metric, 0 where there are none.
    state_errors: leaf path -> error, by the same measure, of the state after the step.
    tolerance: what `ok` compares with.
  """

  errors: dict[str, float]
  loss_error: float
  metrics_error: float
  state_errors: dict[str, float]
  tolerance: float

  @property
  def worst(self) -> float:
    """The largest error, those of loss and metrics included."""
    states = self.state_errors.values()
    return max([*self.errors.values(), *states, self.loss_error, self.metrics_error])

  @property
  def ok(self) -> bool:
    """Whether everything is within the tolerance."""
    return self.worst <= self.tolerance

  def __str__(self) -> str:
    lines = [f"{error:10.2e}  {path}" for path, error in self.errors.items()]
    verdict = "ok" if self.ok else "NOT EQUAL"
    lines += [f"{error:10.2e}  state{path}" for path, error in self.state_errors.items()]
    lines += [
      f"{self.loss_error:10.2e}  loss",
      f"{self.metrics_error:10.2e}  metrics",
      f"{verdict}: worst {self.worst:.2e}, allowed {self.tolerance:.0e}",
      *([] if self.ok or self.tolerance < 1e-9 else [_ROUNDING]),
    ]
    return "\n".join(lines)


def leaf_errors(grads: Tree, reference: Tree) -> dict[str, float]:
  """Error of every leaf by the measure of `Report.errors`.

  Leaves whose gradient is zero by mathematics (a key bias) get the scale of the largest leaf:
  against their own, rounding would look like failure.
  """
  # Differences of flags and of unsigned numbers are no numbers.
  as_float = lambda leaf: leaf if np.issubdtype(leaf.dtype, np.inexact) else leaf.astype(float)  # noqa: E731
  got, want = jax.tree.map(as_float, jax.device_get((grads, reference)))
  pairs = list(zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True))
  largest = max((float(np.abs(r).max(initial=0)) for (_, r), _ in pairs), default=0.0)
  floor = max(1e-3 * largest, np.finfo(np.float64).tiny)
  return {
    jax.tree_util.keystr(path): _no_nan(
      np.abs(g - r).max(initial=0) / max(np.abs(r).max(initial=0), floor)
    )
    for (path, r), g in pairs
  }


def _no_nan(error: Any) -> float:
  """The error, infinite for NaN: Python's `max` and `<=` would pass over a NaN in silence."""
  return float("inf") if np.isnan(error) else float(error)


def _relative(got: Any, want: Any) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  scale = np.maximum(np.abs(want), np.finfo(np.float64).tiny)
  return _no_nan(np.max(np.abs(got - want) / scale, initial=0))


def check(
  stack: Any,
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
) -> Report:
  """Runs pipeline and reference on one batch and compares every gradient leaf.

  Args:
    stack, schedule, mesh, residuals, slack, unroll: as for `pipeline_value_and_grad`.
    batch: leaves `[B, ...]`, small enough that one device can hold the whole model.
    params: canonical; default, `stack.init(key, batch)`.
    state: canonical; default, `stack.init_state(key, batch)`, where the stack has any.
    key: seeds dropout; default, key 0.
    tolerance: default, by the coarsest parameter: 1e-12 for float64, 1e-5 for float32, else 1e-2.

  Returns:
    A `Report`; print it for a line per leaf.
  """
  key = jax.random.key(0) if key is None else key
  params = stack.init(key, batch) if params is None else params
  options: dict[str, Any] = dict(residuals=residuals, slack=slack, unroll=unroll)
  step = pipeline_value_and_grad(stack, schedule, mesh, **options, poison=True)
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
  states = (unplace(after[0], stack, schedule), true_after[0]) if after else ({}, {})
  if tolerance is None:
    coarsest = min((leaf.dtype.itemsize for leaf in jax.tree.leaves(params)), default=4)
    tolerance = {8: 1e-12, 4: 1e-5}.get(coarsest, 1e-2)
  pairs = zip(jax.tree.leaves(metrics), jax.tree.leaves(true_metrics), strict=True)
  return Report(
    errors=leaf_errors(unplace(grads, stack, schedule), true_grads),
    loss_error=_relative(loss, true_loss),
    metrics_error=max([0.0, *(_relative(got, want) for got, want in pairs)]),
    state_errors=leaf_errors(*states),
    tolerance=tolerance,
  )
