"""Pairs of texts: tags, padding, batches by seed and step, and sampling by temperature."""

import numpy as np
import pytest

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.pairs import (
  BEGIN,
  END,
  PAD,
  PairBatches,
  PairVocabulary,
  encode_pairs,
  in_batches,
  language_shares,
)
from jaxpipe.data.text.tokenizer import ByteTokenizer

CATALOGUE = {
  "de": {f"name {i}": f"Name {i}" for i in range(32)},
  "fr": {"name 1": "nom 1"},
}
VOCABULARY = PairVocabulary(ByteTokenizer(), ("fr", "de"))
PAIRS = encode_pairs(CATALOGUE, VOCABULARY, 10)


def test_a_source_begins_with_its_tag_and_both_sides_end():
  assert VOCABULARY.size == 3 + 2 + 256
  assert VOCABULARY.source("ab", "fr") == [3, 5 + ord("a"), 5 + ord("b"), END]
  assert VOCABULARY.source("ab", "de")[0] == 4
  assert VOCABULARY.target("é") == [5 + 0xC3, 5 + 0xA9, END]
  with pytest.raises(DataError, match=r"'it' has no tag; use one of fr, de"):
    VOCABULARY.source("ab", "it")


def test_text_comes_back_up_to_its_end():
  ids = VOCABULARY.target("Côte d’Ivoire")
  assert VOCABULARY.text([BEGIN, *ids, *VOCABULARY.target("more"), PAD]) == "Côte d’Ivoire"
  assert VOCABULARY.text([]) == ""


def test_a_batch_is_shifted_and_padded():
  batch = PAIRS.batch(np.array([PAIRS.of("fr")[0], 31, -1]))
  nom = VOCABULARY.target("nom 1")
  assert batch["source"][0].tolist() == [*VOCABULARY.source("name 1", "fr"), PAD, PAD]
  assert batch["targets"][0].tolist() == [*nom, *[PAD] * 4]
  assert batch["tokens"][0].tolist() == [BEGIN, *nom[:-1], *[PAD] * 4]
  assert batch["weights"][0].tolist() == [1] * 6 + [0] * 4
  assert VOCABULARY.text(batch["targets"][1]) == "Name 31" == PAIRS.texts[31][1]
  assert not batch["weights"][2].any() and not batch["source"][2].any()


def test_the_longest_target_has_no_end_among_its_inputs():
  batch = encode_pairs({"de": {"ab": "abc"}}, VOCABULARY, 4).batch(np.array([0]))
  assert batch["targets"][0, -1] == END
  assert END not in batch["tokens"] and batch["weights"].all()


def test_pairs_that_are_too_long_are_counted():
  pairs = encode_pairs(CATALOGUE, VOCABULARY, 8)
  assert pairs.left_out == 22 and pairs.counts.tolist() == [10, 1]
  with pytest.raises(DataError, match=r"of 32 pairs in 'de' none has at most 4 tokens"):
    encode_pairs(CATALOGUE, VOCABULARY, 4)


def test_shares_are_counts_to_the_power_of_one_over_t():
  counts = [1, 32, 243]
  np.testing.assert_allclose(language_shares(counts, 5), np.array([1, 2, 3]) / 6, rtol=1e-12)
  np.testing.assert_allclose(language_shares(counts, 1), np.array(counts) / 276, rtol=1e-12)
  np.testing.assert_allclose(language_shares(counts, 1e9), np.full(3, 1 / 3), rtol=1e-6)
  assert language_shares(counts, 1e-4).tolist() == [0, 0, 1]
  with pytest.raises(DataError, match=r"--temperature=0: use a number above 0"):
    language_shares(counts, 0)


@pytest.mark.parametrize("temperature, share", [(1, 1 / 33), (5, 1 / 3)])
def test_batches_draw_languages_by_their_shares_and_pairs_alike(temperature, share):
  batches = PairBatches(PAIRS, 3000, 0, temperature)
  tags = batches[1]["source"][:, 0]
  assert abs(np.mean(tags == 3) - share) < 4 * (share * (1 - share) / 3000) ** 0.5
  german = np.unique(batches[1]["source"][tags == 4], axis=0, return_counts=True)[1]
  assert len(german) == 32 and german.min() > 0.5 * german.mean()


def test_batch_is_a_pure_function_of_seed_and_step():
  for name, array in PairBatches(PAIRS, 8, 3)[2].items():
    np.testing.assert_array_equal(array, PairBatches(PAIRS, 8, 3)[2][name])
  sources = [PairBatches(PAIRS, 8, seed)[k]["source"].tobytes() for seed in (3, 4) for k in (0, 1)]
  assert len(set(sources)) == 4
  with pytest.raises(IndexError, match="steps start at 0"):
    PairBatches(PAIRS, 8, 3)[-1]


def test_other_data_have_another_identity():
  others = [CATALOGUE | {"fr": {"name 1": "nom 2"}}, CATALOGUE | {"fr": CATALOGUE["de"]}]
  known = [
    PairBatches(encode_pairs(c, VOCABULARY, 10), 8, 3).identity for c in [CATALOGUE, *others]
  ]
  assert known[0] == PairBatches(PAIRS, 9, 4).identity
  assert known[0] != known[1] and known[0] != known[2]


def test_evaluation_covers_every_pair_once():
  pieces = list(in_batches(np.arange(5), 3))
  assert [p.tolist() for p in pieces] == [[0, 1, 2], [3, 4, -1]]
