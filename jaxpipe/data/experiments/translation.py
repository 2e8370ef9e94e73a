"""Prepares the data of a translation run: names of iso-codes, split and encoded.

The shared subwords are learned from the training names of all default languages, whatever is then
trained, so that a model for one language pair has the vocabulary, and the size, of one for all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.isocodes import SPLITS, Catalogue, read_catalogue, split_catalogue
from jaxpipe.data.experiments.pairs import Pairs, PairVocabulary, encode_pairs
from jaxpipe.data.text.tokenizer import make_tokenizer

# Written in Latin letters, related in groups, from thousands of names down to a few hundred.
LANGUAGES = ("da", "de", "es", "fr", "it", "nl", "sv", "af", "fur", "nn")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TranslationData:
  """The pairs of a translation run.

  Attributes:
    vocabulary: ids that sources and targets of all languages share.
    train: pairs to train on.
    validation: held-out pairs, to measure on during training.
    test: held-out pairs, to translate at the end. No English name is in two of the three.
  """

  vocabulary: PairVocabulary
  train: Pairs
  validation: Pairs
  test: Pairs

  def table(self) -> str:
    """Returns a table of how many pairs each language has in each split, as text."""
    lines = [f"{'':8}" + "".join(f"{split:>12}" for split in SPLITS)]
    for n, language in enumerate(self.train.languages):
      counts = (getattr(self, split).counts[n] for split in SPLITS)
      lines.append(f"{language:8}" + "".join(f"{count:12,}" for count in counts))
    left_out = sum(getattr(self, split).left_out for split in SPLITS)
    return "\n".join([*lines, f"{left_out} longer pairs are left out"])


def prepare_translation(
  languages: Sequence[str],
  *,
  standards: Sequence[str],
  vocabulary_size: int,
  longest: int,
  cache_dir: str | os.PathLike[str],
) -> TranslationData:
  """Reads, splits and encodes the names of some languages.

  Args:
    languages: codes as in `available_languages`, each once.
    standards: whose names, of `STANDARDS`.
    vocabulary_size: subwords, above 256; bytes are among them.
    longest: ids of a source or target, its tag and END counted.
    cache_dir: where trained tokenizers are kept.

  Raises:
    DataError: whatever does not fit, or pycountry is not installed.
  """
  if len(set(languages)) < len(languages) or not languages:
    raise DataError(f"--languages={','.join(languages)}: give at least one, and each once")
  tagged = tuple(dict.fromkeys([*LANGUAGES, *languages]))
  catalogue = read_catalogue(tagged, standards)
  tokenizer = make_tokenizer(
    f"bpe:{vocabulary_size}",
    text=lambda: _all_text(split_catalogue(catalogue, "train")),
    cache_dir=cache_dir,
  )
  vocabulary = PairVocabulary(tokenizer, tagged)
  chosen = {language: catalogue[language] for language in languages}
  parts = {split: split_catalogue(chosen, split) for split in SPLITS}
  train, validation, test = (encode_pairs(parts[split], vocabulary, longest) for split in SPLITS)
  return TranslationData(
    vocabulary=vocabulary,
    train=train,
    validation=validation,
    test=test,
  )


def _all_text(catalogue: Catalogue) -> str:
  """Every name of either side once, a line each."""
  names = (name for pairs in catalogue.values() for pair in pairs.items() for name in pair)
  return "\n".join(sorted(set(names)))
