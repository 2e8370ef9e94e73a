"""Scores translations by sacrebleu, so that the figures compare with published ones.

References:
  Post, A Call for Clarity in Reporting BLEU Scores, arXiv:1804.08771; BLEU: Papineni et al., 2002;
  chrF: Popovic, 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxpipe.training.flags.errors import ConfigError


def bleu_scores(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """Scores a corpus of translations, each figure from 0 to 100.

  Args:
    said: the model's translations, at least one.
    wanted: a reference translation for each.

  Returns:
    `bleu` (words, `tokenize=13a`), `char_bleu` (characters, `tokenize=char`: names are short, and
    half a name is worth something), `chrf`, and `exact`, texts that are right to the letter.

  Raises:
    ConfigError: sacrebleu is not installed.
  """
  try:
    import sacrebleu
  except ModuleNotFoundError:
    raise ConfigError("sacrebleu is not installed, which measures; pip install sacrebleu") from None
  references = [list(wanted)]
  exact = sum(a == b for a, b in zip(said, wanted, strict=True))
  return {
    "bleu": sacrebleu.corpus_bleu(said, references).score,
    "char_bleu": sacrebleu.corpus_bleu(said, references, tokenize="char").score,
    "chrf": sacrebleu.corpus_chrf(said, references).score,
    "exact": 100 * exact / len(said),
  }
