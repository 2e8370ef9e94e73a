"""The oracle, on the user's own stack: how far is the pipeline from the unpipelined model?"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.parallel.placing import place, unplace
from jaxpipe.pipeline.executor import pipeline_value_and_grad
from jaxpipe.pipeline.reference import reference_value_and_grad
from jaxpipe.schedules import Schedule

Tree = Any


@dataclasses.dataclass(frozen=True)
class Report:
  """How far each gradient leaf of the pipeline is from the reference.

  Attributes:
    errors: leaf path -> max|g - r| / max(max|r|, 1e-3 * the largest max|r| of any leaf).
    loss_error: relative error of the loss.
    tolerance: what `ok` compares with.
  """

  errors: dict[str, float]
  loss_error: float
  tolerance: float

  @property
  def worst(self) -> float:
    """The largest error, the loss's included; NaN anywhere counts as infinite."""
    values = [*self.errors.values(), self.loss_error]
    return max(float("inf") if np.isnan(v) else v for v in values)

  @property
  def ok(self) -> bool:
    """Whether everything is within the tolerance."""
    return self.worst <= self.tolerance

  def __str__(self) -> str:
    lines = [f"{error:10.2e}  {path}" for path, error in self.errors.items()]
    verdict = "ok" if self.ok else "NOT EQUAL"
    lines += [
      f"{self.loss_error:10.2e}  loss",
      f"{verdict}: worst {self.worst:.2e}, allowed {self.tolerance:.0e}",
    ]
    return "\n".join(lines)


def leaf_errors(grads: Tree, reference: Tree) -> dict[str, float]:
  """Error of every leaf by the measure of `Report.errors`.

  Leaves whose gradient is zero by mathematics (a key bias) get the scale of the largest leaf:
  against their own, rounding would look like failure.
  """
  got, want = jax.device_get((grads, reference))
  pairs = list(zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True))
  largest = max(float(np.abs(r).max()) for (_, r), _ in pairs)
  floor = max(1e-3 * largest, np.finfo(np.float64).tiny)
  return {
    jax.tree_util.keystr(path): float(np.abs(g - r).max()) / max(float(np.abs(r).max()), floor)
    for (path, r), g in pairs
  }


def check(
  stack: Any,
  schedule: Schedule,
  mesh: Mesh,
  batch: Tree,
  *,
  params: Tree | None = None,
  key: jax.Array | None = None,
  residuals: str = "dots",
  tolerance: float | None = None,
) -> Report:
  """Runs pipeline and reference on one batch and compares every gradient leaf.

  Args:
    stack, schedule, mesh, residuals: as for `pipeline_value_and_grad`.
    batch: leaves `[B, ...]`, small enough that one device can hold the whole model.
    params: canonical; default, `stack.init` from key 0.
    key: seeds dropout; default, key 0.
    tolerance: default 1e-12 where the parameters are float64, else 1e-5.

  Returns:
    A `Report`; print it for a line per leaf.
  """
  key = jax.random.key(0) if key is None else key
  params = stack.init(key, batch) if params is None else params
  step = pipeline_value_and_grad(stack, schedule, mesh, residuals=residuals, poison=True)
  (loss, _), grads = step(place(params, stack, schedule, mesh), batch, key)
  reference = reference_value_and_grad(stack, schedule.microbatches)
  (true_loss, _), true_grads = reference(params, batch, key)
  double = all(leaf.dtype.itemsize == 8 for leaf in jax.tree.leaves(params))
  if tolerance is None:
    tolerance = 1e-12 if double else 1e-5
  error = abs(float(loss) - float(true_loss)) / max(abs(float(true_loss)), 1e-30)
  return Report(leaf_errors(unplace(grads, stack, schedule), true_grads), error, tolerance)
