"""Makes batches of pairs of texts in two languages, for one model that translates into many.

The source begins with the tag of the language that it is to become, and all languages share the
subwords and the model (Johnson et al., Google's Multilingual Neural Machine Translation System,
arXiv:1611.04558). A training batch draws every row's language anew with probability p ~ n^(1/T),
of n pairs of that language (Arivazhagan et al., arXiv:1907.05019; GPipe trains with T = 5): T = 1
draws as the pairs are, a large T all languages alike.

    source    <2de> Re public of Malta <end> <pad>
    tokens    <begin> Re pub lik Malta <pad>           what the decoder reads
    targets   Re pub lik Malta <end> <pad>             what it is to say
    weights   1 1 1 1 1 0

Dims: B rows of the batch, S and T longest source and target.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.isocodes import Catalogue
from jaxpipe.data.text.tokenizer import Tokenizer
from jaxpipe.data.text.windows import Batch

PAD, BEGIN, END = 0, 1, 2
_FIRST_TAG = 3


@dataclasses.dataclass(frozen=True, eq=False)
class PairVocabulary:
  """The ids that all languages share: padding, begin and end, a tag for each language, subwords.

  Attributes:
    tokenizer: divides texts into subwords.
    languages: codes of those that have a tag, into which a model may translate.
  """

  tokenizer: Tokenizer
  languages: tuple[str, ...]

  @property
  def size(self) -> int:
    """V, the number of ids."""
    return self._first_subword + self.tokenizer.vocabulary_size

  @property
  def _first_subword(self) -> int:
    return _FIRST_TAG + len(self.languages)

  def source(self, text: str, language: str) -> list[int]:
    """Returns the ids of a text that is to be translated into `language`, its tag first.

    Raises:
      DataError: a language without a tag.
    """
    if language not in self.languages:
      raise DataError(f"{language!r} has no tag; use one of {', '.join(self.languages)}")
    return [_FIRST_TAG + self.languages.index(language), *self._subwords(text), END]

  def target(self, text: str) -> list[int]:
    """Returns the ids that the decoder should produce for a text."""
    return [*self._subwords(text), END]

  def text(self, ids: Iterable[int]) -> str:
    """Returns the text of ids that a decoder has produced, up to the first END."""
    said = []
    for i in map(int, ids):
      if i == END:
        break
      if i >= self._first_subword:
        said.append(i - self._first_subword)
    return self.tokenizer.decode(said)

  def _subwords(self, text: str) -> list[int]:
    return (self.tokenizer.encode(text) + self._first_subword).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
  """Encoded pairs of all languages, one language after the other.

  Attributes:
    languages: their codes, in the order of the pairs.
    counts: int64 [languages], number of pairs of each.
    source: int32 [pairs, S], ids of the English, padded.
    target: int32 [pairs, T], ids of the translation, padded.
    texts: of each pair, the English and its translation.
    left_out: number of pairs that were longer than S or T.
  """

  languages: tuple[str, ...]
  counts: npt.NDArray[np.int64]
  source: npt.NDArray[np.int32]
  target: npt.NDArray[np.int32]
  texts: tuple[tuple[str, str], ...]
  left_out: int = 0

  def batch(self, which: npt.NDArray[np.int64]) -> Batch:
    """Returns some pairs as a batch.

    Args:
      which: int [B], numbers of pairs; -1 stands for a row of padding.

    Returns:
      `source` int32 [B, S], `tokens` and `targets` int32 [B, T], `weights` float32 [B, T].
    """
    there = (which >= 0)[:, None]
    source, target = np.where(there, self.source[which], PAD), self.target[which]
    target = np.where(there, target, PAD)
    tokens = np.roll(target, 1, axis=1)
    # The END of a shorter target is no input; of the longest it has rolled out to the front.
    tokens[tokens == END] = PAD
    tokens[:, 0] = BEGIN
    weights = (target != PAD).astype(np.float32)
    return {"source": source, "tokens": tokens, "targets": target, "weights": weights}

  def of(self, language: str) -> npt.NDArray[np.int64]:
    """Returns the numbers of the pairs of one language."""
    n = self.languages.index(language)
    start = int(self.counts[:n].sum())
    return np.arange(start, start + int(self.counts[n]))


def encode_pairs(catalogue: Catalogue, vocabulary: PairVocabulary, longest: int) -> Pairs:
  """Encodes a catalogue; pairs with a side of more than `longest` ids are left out and counted.

  Raises:
    DataError: a language of which no pair is left.
  """
  sources, targets, texts, counts, left_out = [], [], [], [], 0
  for language, names in catalogue.items():
    kept = 0
    for english, there in names.items():
      source, target = vocabulary.source(english, language), vocabulary.target(there)
      if max(len(source), len(target)) > longest:
        left_out += 1
        continue
      kept += 1
      sources.append(source)
      targets.append(target)
      texts.append((english, there))
    if not kept:
      raise DataError(
        f"of {len(names)} pairs in {language!r} none has at most {longest} tokens a side; use a"
        " longer --sequence_length, other --standards, or leave it out of --languages"
      )
    counts.append(kept)
  return Pairs(
    languages=tuple(catalogue),
    counts=np.array(counts, np.int64),
    source=_padded(sources, longest),
    target=_padded(targets, longest),
    texts=tuple(texts),
    left_out=left_out,
  )


def language_shares(counts: Sequence[int], temperature: float) -> npt.NDArray[np.float64]:
  """Returns the probability of drawing each language, p ~ n^(1/T) for n pairs.

  >>> language_shares([1, 32], 5.0).tolist()
  [0.3333333333333333, 0.6666666666666666]

  Raises:
    DataError: a temperature that is not above 0.
  """
  if temperature <= 0:
    raise DataError(f"--temperature={temperature}: use a number above 0; 1 draws pairs alike")
  # In logarithms: at a low temperature the powers themselves overflow.
  powers = np.log(np.asarray(counts, np.float64)) / temperature
  shares: npt.NDArray[np.float64] = np.exp(powers - powers.max())
  return shares / shares.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class PairBatches:
  """An endless sequence of training batches: `batches[k]` is a pure function of (seed, k).

  Attributes:
    pairs: what is drawn from, with replacement.
    batch_size: B.
    seed: any integer.
    temperature: T of `language_shares`.

  Raises:
    DataError: a temperature not above 0.
  """

  pairs: Pairs
  batch_size: int
  seed: int
  temperature: float = 5.0

  def __post_init__(self) -> None:
    self._edges  # noqa: B018 - now, not at the first batch

  @property
  def identity(self) -> dict[str, str]:
    """JSON values that mark the data, for a resumed run to compare."""
    content = hashlib.sha256(self.pairs.source.tobytes() + self.pairs.target.tobytes())
    return {"languages": ",".join(self.pairs.languages), "pairs": content.hexdigest()[:32]}

  def __getitem__(self, step: int) -> Batch:
    """Returns batch `step`.

    Raises:
      IndexError: a negative step; there is no last batch to count from.
    """
    if step < 0:
      raise IndexError(f"batch {step}: steps start at 0")
    return self.pairs.batch(self._draw(step))

  @functools.cached_property
  def _edges(self) -> npt.NDArray[np.float64]:
    return np.cumsum(language_shares(self.pairs.counts.tolist(), self.temperature))

  @functools.cached_property
  def _key(self) -> int:
    return int.from_bytes(hashlib.sha256(f"pairs {self.seed}".encode()).digest()[:16], "little")

  def _draw(self, step: int) -> npt.NDArray[np.int64]:
    """Numbers of the B pairs of a batch."""
    # Raw bits of a counter-based generator: its methods may change between versions of NumPy.
    generator = np.random.Philox(key=self._key, counter=step << 64)
    bits = generator.random_raw(2 * self.batch_size) >> np.uint64(11)
    which, within = (bits.astype(np.float64) / 2**53).reshape(2, -1)
    counts = self.pairs.counts
    # Rounding may leave the last edge below 1.
    language = np.minimum(np.searchsorted(self._edges, which, side="right"), len(counts) - 1)
    starts = np.cumsum(counts) - counts
    return starts[language] + (within * counts[language]).astype(np.int64)


def in_batches(which: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
  """Divides numbers of pairs into batches of one size; -1 fills the last (see `Pairs.batch`)."""
  for start in range(0, len(which), size):
    numbers = which[start : start + size]
    yield np.concatenate([numbers, np.full(size - len(numbers), -1, np.int64)])


def _padded(rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.int32]:
  padded = np.full((len(rows), length), PAD, np.int32)
  for row, ids in zip(padded, rows, strict=True):
    row[: len(ids)] = ids
  return padded
