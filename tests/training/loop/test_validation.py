"""Nats per byte: every target once, each worth its own number of bytes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxpipe.data import EvaluationBatches, open_bin, write_bin
from jaxpipe.training.loop.validation import make_validation, sum_over


@pytest.mark.parametrize("count", [2, 30, 33, 37])
def test_every_target_counts_once_by_its_bytes(tmp_path: Path, count: int) -> None:
  tokens = np.arange(count) % 11
  write_bin(tmp_path / "t.bin", tokens, vocabulary_size=11, fingerprint="ab" * 32)
  batches = EvaluationBatches(open_bin(tmp_path / "t.bin"), 2, 8)
  lengths = np.arange(1, 12, dtype=np.int32)

  def evaluate(params: float, batch: dict[str, Any]) -> tuple[float, dict[str, float]]:
    # As if the loss of target t were t nats.
    weights = batch["weights"]
    return params * float((batch["targets"] * weights).sum() / weights.sum()), {}

  tokenizer: Any = SimpleNamespace(byte_lengths=lengths)
  validate = make_validation(evaluate, batches, tokenizer, lambda batch: batch)
  want = 3.0 * tokens[1:].sum() / lengths[tokens[1:]].sum()
  assert validate(3.0) == pytest.approx(want, rel=1e-12)  # type: ignore[arg-type]


def test_a_batch_of_weight_zero_does_not_spoil_a_validation() -> None:
  """Its mean loss is that of nothing, and was NaN times 0."""
  losses = {"a": 2.0, "nothing": float("nan"), "b": 4.0}
  totals = sum_over(
    lambda name: (losses[name], {"correct": 1.0}), [("a", 3.0), ("nothing", 0.0), ("b", 1.0)]
  )
  assert totals.loss / totals.weight == pytest.approx(2.5)
