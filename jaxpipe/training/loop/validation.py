"""Measures losses on held-out data, by the forward pass of the pipeline that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpipe.data import EvaluationBatches, Tokenizer

Tree = Any


class Totals(NamedTuple):
  """Sums over validation batches, in float64.

  Attributes:
    loss: sum of the batches' mean losses, each times the batch's weight.
    metrics: sums of the head's own metrics; None before the first batch.
    weight: sum of the weights.
  """

  loss: np.float64
  metrics: Tree
  weight: np.float64


def sum_over(
  evaluate: Callable[[Any], tuple[Any, Tree]], batches: Iterable[tuple[Any, float]]
) -> Totals:
  """Evaluates some batches and adds up their losses and metrics.

  Args:
    evaluate: `batch -> (mean loss, metrics)`, arrays that need not be ready when it returns.
    batches: pairs of a batch and its weight over all processes; at least one.

  Returns:
    The sums over all batches.
  """
  totals, held = Totals(np.float64(0), None, np.float64(0)), None
  for batch, weight in batches:
    # Fetched when the next batch is under way, so that devices do not wait; and not later, since
    # CPU devices share threads and dead-lock when too many programs queue for each other.
    under_way = evaluate(batch), weight
    totals, held = _add(totals, held), under_way
  return _add(totals, held)


def _add(totals: Totals, held: tuple[tuple[Any, Tree], float] | None) -> Totals:
  """Waits for a batch's results and adds them to the sums; None adds nothing."""
  if held is None:
    return totals
  (mean_loss, metrics), weight = jax.device_get(held[0]), np.float64(held[1])
  wide = jax.tree.map(np.float64, metrics)
  return Totals(
    # A mean over nothing is no part of the sum, whatever it is.
    loss=totals.loss + (np.float64(mean_loss) * weight if weight else 0),
    metrics=wide if totals.metrics is None else jax.tree.map(np.add, totals.metrics, wide),
    weight=totals.weight + weight,
  )


def make_validation(
  evaluate: Callable[..., tuple[Any, Tree]],
  batches: EvaluationBatches,
  tokenizer: Tokenizer,
  put: Callable[[Tree], Tree],
) -> Callable[..., float]:
  """Returns `validate(params, *state) -> nats per byte` over the whole split.

  Args:
    evaluate: `(params, batch, *state) -> (mean loss, metrics)`, from `pipeline_forward`; `state` is
      given of a model that has some.
    batches: the held-out split; its last batch is padded with weight 0.
    tokenizer: knows how many bytes of text each target stands for.
    put: makes a batch on the mesh of the rows that this process has read.
  """
  total_bytes = batches.target_bytes(tokenizer.byte_lengths)
  # Targets of a batch that is not padded. Counted, not summed: other processes have other rows.
  full = batches.batch_size * batches.sequence_length

  def weighed() -> Iterator[tuple[Any, float]]:
    for i, batch in enumerate(batches):
      yield put(batch), min(full, batches.target_count - i * full)

  def validate(params: Tree, *state: Tree) -> float:
    totals = sum_over(lambda batch: evaluate(params, batch, *state), weighed())
    # Of the text alone: what routers of experts add to the loss is no part of its likelihood.
    nats = totals.loss - totals.metrics.get("router_loss", 0)
    return float(nats) / total_bytes

  return validate
