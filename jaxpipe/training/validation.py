"""Loss on held-out text, over the same pipeline that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpipe.data import EvaluationBatches, Tokenizer

Tree = Any


def make_validation(
  evaluate: Callable[..., tuple[Any, Tree]],
  batches: EvaluationBatches,
  tokenizer: Tokenizer,
  put: Callable[[Tree], Tree],
) -> Callable[[Tree], float]:
  """Returns `validate(params) -> nats per byte` over the whole split.

  Args:
    evaluate: `(params, batch) -> (mean loss, metrics)`, of `pipeline_forward`.
    batches: the split; its last batch is padded with weight 0.
    tokenizer: says how many bytes the targets stand for.
    put: makes a batch on the mesh of the rows that this process has read.
  """
  total_bytes = batches.target_bytes(tokenizer.byte_lengths)
  # Targets of a batch that is not padded. Counted, not summed: other processes have other rows.
  full = batches.batch_size * batches.sequence_length

  def validate(params: Tree) -> float:
    held: tuple[Any, Tree, np.float64] = (np.float64(0), {}, np.float64(0))
    nats = np.float64(0)
    for i, batch in enumerate(batches):
      # Fetched when the next batch is under way, so that devices do not wait; and not later, since
      # CPU devices share threads and dead-lock when too many programs queue for each other.
      weight = np.float64(min(full, batches.target_count - i * full))
      under_way = *evaluate(params, put(batch)), weight
      nats, held = nats + _nats(*held), under_way
    return float(nats + _nats(*held)) / total_bytes

  return validate


def _nats(mean_loss: Any, metrics: Tree, weight: np.float64) -> np.float64:
  """Of the text alone: what routers of experts add to the loss is no part of its likelihood."""
  return np.float64(mean_loss) * weight - np.float64(metrics.get("router_loss", 0))
