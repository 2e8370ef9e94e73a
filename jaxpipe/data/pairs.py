"""Pairs of texts in two languages, as the arrays of a batch: one model for all languages.

The source begins with the tag of the language that it is to become, and all languages share the
subwords and the model (Johnson et al., Google's Multilingual Neural Machine Translation System,
arXiv:1611.04558). A training batch draws every row's language anew with probability p ~ n^(1/T),
of n pairs of that language (Arivazhagan et al., arXiv:1907.05019; GPipe trains with T = 5): T = 1
draws as the pairs are, a large T all languages alike.

    source    <2de> Re public of Malta <end> <pad>
    tokens    <begin> Re pub lik Malta <pad>           what the decoder reads
    targets   Re pub lik Malta <end> <pad>             what it is to say
    weights   1 1 1 1 1 0

Dims: B rows of the batch, R rows of it that are read here, S and T longest source and target.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError
from jaxpipe.data.isocodes import Catalogue
from jaxpipe.data.tokenizer import Tokenizer
from jaxpipe.data.windows import Batch, Rows, pick_rows

PAD, BEGIN, END = 0, 1, 2
_FIRST_TAG = 3


@dataclasses.dataclass(frozen=True, eq=False)
class PairVocabulary:
  """Ids of one shared vocabulary: padding, begin and end, a tag for each language, subwords.

  Attributes:
    tokenizer: gives the subwords.
    languages: those that have a tag; a model translates into these.
  """

  tokenizer: Tokenizer
  languages: tuple[str, ...]

  @property
  def size(self) -> int:
    """V."""
    return self._first_subword + self.tokenizer.vocabulary_size

  @property
  def _first_subword(self) -> int:
    return _FIRST_TAG + len(self.languages)

  def source(self, text: str, language: str) -> list[int]:
    """Ids of a text that is to become `language`.

    Raises:
      DataError: a language without a tag.
    """
    if language not in self.languages:
      raise DataError(f"{language!r} has no tag; use one of {', '.join(self.languages)}")
    return [_FIRST_TAG + self.languages.index(language), *self._subwords(text), END]

  def target(self, text: str) -> list[int]:
    """Ids that the decoder is to say for a text."""
    return [*self._subwords(text), END]

  def text(self, ids: Iterable[int]) -> str:
    """The text of what a decoder said, up to the first END."""
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
    languages: in their order.
    counts: int64 [languages], pairs of each.
    source: int32 [pairs, S].
    target: int32 [pairs, T].
    left_out: pairs that are longer than S or T.
  """

  languages: tuple[str, ...]
  counts: npt.NDArray[np.int64]
  source: npt.NDArray[np.int32]
  target: npt.NDArray[np.int32]
  left_out: int = 0

  def batch(self, which: npt.NDArray[np.int64]) -> Batch:
    """The pairs numbered in `which`, R of them; -1 stands for a row of padding.

    Returns:
      `source` int32 [R, S], `tokens` and `targets` int32 [R, T], `weights` float32 [R, T].
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
    """Numbers of the pairs of one language."""
    n = self.languages.index(language)
    start = int(self.counts[:n].sum())
    return np.arange(start, start + int(self.counts[n]))


def encode_pairs(catalogue: Catalogue, vocabulary: PairVocabulary, longest: int) -> Pairs:
  """Encodes a catalogue; pairs with a side of more than `longest` ids are left out and counted.

  Raises:
    DataError: a language of which no pair is left.
  """
  sources, targets, counts, left_out = [], [], [], 0
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
    left_out=left_out,
  )


def language_shares(counts: Sequence[int], temperature: float) -> npt.NDArray[np.float64]:
  """Probability of drawing each language: p ~ n^(1/T).

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
    batch_size: B, rows of the whole batch, over all processes.
    seed: any integer.
    temperature: T of `language_shares`.
    rows: which of the B rows to read, as for `TokenBatches`; never changes what a row holds.

  Raises:
    DataError: sizes below 1, rows outside the batch, or a temperature not above 0.
  """

  pairs: Pairs
  batch_size: int
  seed: int
  temperature: float = 5.0
  rows: Rows = dataclasses.field(default=None, kw_only=True)

  def __post_init__(self) -> None:
    if self.batch_size < 1:
      raise DataError(f"--batch_size={self.batch_size}: must be at least 1")
    pick_rows(self.batch_size, self.rows)
    language_shares(self.pairs.counts.tolist(), self.temperature)

  @functools.cached_property
  def identity(self) -> dict[str, int | str | float]:
    """What decides every batch, for a checkpoint to compare; not `rows`, which do not."""
    content = hashlib.sha256(self.pairs.source.tobytes() + self.pairs.target.tobytes())
    return {
      "pairs": content.hexdigest()[:32],
      "languages": ",".join(self.pairs.languages),
      "batch_size": self.batch_size,
      "seed": self.seed,
      "temperature": self.temperature,
    }

  @property
  def fingerprint(self) -> str:
    """32 hex digits: equal for equal `identity`, so for the same batches at all steps."""
    return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

  def __getitem__(self, step: int) -> Batch:
    """Returns batch `step`, the rows that `rows` selects.

    Raises:
      IndexError: a negative step; there is no last batch to count from.
    """
    if step < 0:
      raise IndexError(f"batch {step}: steps start at 0")
    return self.pairs.batch(self._draw(step)[pick_rows(self.batch_size, self.rows)])

  def iterate(self, start: int = 0) -> Iterator[Batch]:
    """Iterates over batches `start`, `start + 1`, ... without end."""
    while True:
      yield self[start]
      start += 1

  def _draw(self, step: int) -> npt.NDArray[np.int64]:
    """Numbers of the B pairs of a batch."""
    # Raw bits of a counter-based generator: its methods may change between versions of NumPy.
    key = int.from_bytes(hashlib.sha256(repr(("pairs", self.seed)).encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key, counter=step << 64).random_raw(2 * self.batch_size)
    uniform = (bits >> np.uint64(11)).astype(np.float64) / 2**53
    which, within = uniform[: self.batch_size], uniform[self.batch_size :]
    counts = self.pairs.counts
    edges = np.cumsum(language_shares(counts.tolist(), self.temperature))
    # Rounding may leave the last edge below 1.
    language = np.minimum(np.searchsorted(edges, which, side="right"), len(counts) - 1)
    starts = np.cumsum(counts) - counts
    return starts[language] + (within * counts[language]).astype(np.int64)


def in_batches(which: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
  """Cuts numbers of pairs into batches of one size; -1 fills the last (see `Pairs.batch`)."""
  for start in range(0, len(which), size):
    piece = which[start : start + size]
    yield np.concatenate([piece, np.full(size - len(piece), -1, np.int64)])


def _padded(rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.int32]:
  padded = np.full((len(rows), length), PAD, np.int32)
  for row, ids in zip(padded, rows, strict=True):
    row[: len(ids)] = ids
  return padded
