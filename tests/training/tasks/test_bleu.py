"""Scores: what is asked of sacrebleu, and what a missing package says."""

import sys

import pytest

from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.tasks.bleu import bleu_scores


def test_scores_of_known_texts():
  pytest.importorskip("sacrebleu")
  wanted = ["Republiek van San Marino", "Demokratiese Republiek Kongo"]
  assert all(abs(score - 100) < 1e-9 for score in bleu_scores(wanted, wanted).values())
  said = ["Republiek van San Marina", "Demokratiese Republiek Kongo"]
  scores = bleu_scores(said, wanted)
  # 6 of 7 words, 4 of 5 pairs, 2 of 3 triples, 0 of 1: the last is smoothed to 1/2.
  assert scores["bleu"] == pytest.approx(100 * (6 / 7 * 4 / 5 * 2 / 3 * 1 / 2) ** 0.25)
  assert scores["bleu"] < scores["char_bleu"] < 100 and scores["exact"] == 50


def test_a_missing_package_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  with pytest.raises(ConfigError, match="sacrebleu is not installed"):
    bleu_scores(["a"], ["a"])
