"""Every byte of every text comes back, and is counted exactly once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxpipe.data import BpeTokenizer, ByteTokenizer, DataError, load_bpe, make_tokenizer, train_bpe

CORPUS = "the cat sat on the mat, the naïve café – 東京の猫 🐈\n" * 40
SIZE = 290


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("bpe") / "bpe.json"
  train_bpe(CORPUS, vocabulary_size=SIZE, path=path)
  return path


@pytest.fixture(scope="module")
def bpe(bpe_path: Path) -> BpeTokenizer:
  return load_bpe(bpe_path)


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text("the cat\n \r\t東é🐈<|>endofx")


@hypothesis.given(text=TEXTS)
@hypothesis.settings(deadline=None, max_examples=60)
def test_bytes_round_trip(text: str) -> None:
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) == len(ids)
  np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))


@hypothesis.given(text=TEXTS)
@hypothesis.settings(
  deadline=None,
  max_examples=150,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_bpe_round_trip(bpe: BpeTokenizer, text: str) -> None:
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert bpe.byte_lengths[ids].sum() == len(text.encode())
  np.testing.assert_array_equal(ids, bpe.encode(text.encode()))


def test_bpe_merges_something(bpe: BpeTokenizer) -> None:
  ids = bpe.encode(CORPUS)
  assert ids.dtype == np.int32
  assert len(ids) < len(CORPUS.encode()) / 2
  assert bpe.vocabulary_size == SIZE == len(bpe.byte_lengths)
  assert bpe.byte_lengths.min() == 1 and bpe.byte_lengths.max() > 3


def test_long_text_is_cut_without_loss(bpe: BpeTokenizer) -> None:
  text = CORPUS * 90 + "no newline at the end " * 4000
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert bpe.byte_lengths[ids].sum() == len(text.encode())


def test_training_is_deterministic(bpe: BpeTokenizer, bpe_path: Path, tmp_path: Path) -> None:
  again = train_bpe(CORPUS, vocabulary_size=SIZE, path=tmp_path / "again.json")
  assert (tmp_path / "again.json").read_bytes() == bpe_path.read_bytes()
  assert again.fingerprint == bpe.fingerprint


def test_fingerprints_differ(bpe: BpeTokenizer, tmp_path: Path) -> None:
  other = train_bpe(CORPUS.upper(), vocabulary_size=SIZE, path=tmp_path / "other.json")
  prints = {bpe.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}
  assert len(prints) == 3 and all(len(print_) == 64 for print_ in prints)


def test_added_tokens_are_counted_in_bytes(bpe_path: Path, tmp_path: Path) -> None:
  spec = json.loads(bpe_path.read_text())
  flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  spec["added_tokens"] = [
    {"id": SIZE, "content": "<|end|>", "special": True, **flags},
    {"id": SIZE + 1, "content": "    ", "special": False, **flags},
  ]
  (tmp_path / "added.json").write_text(json.dumps(spec))
  tokenizer = load_bpe(tmp_path / "added.json")
  text = "a <|end|>    b"
  ids = tokenizer.encode(text)
  assert SIZE not in ids and SIZE + 1 in ids
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text)
  assert tokenizer.byte_lengths[SIZE] == 7 == len(tokenizer.decode([SIZE]))


LOSSY: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
  "normaliser": (lambda s: s.update(normalizer={"type": "NFC"}), "it normalises text"),
  "no bytes": (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "not start from bytes"),
  "nothing": (lambda s: s.update(pre_tokenizer=None), "not start from bytes"),
  "no decoder": (lambda s: s.update(decoder=None), "does not decode to bytes"),
  "prefix": (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "adds a space in front"),
  "dropout": (lambda s: s["model"].update(dropout=0.5), "merges are random"),
  "gap": (lambda s: s["model"]["vocab"].pop("~"), "lacks some of the 256 bytes"),
  "drops": (
    lambda s: s.update(
      pre_tokenizer={
        "type": "Sequence",
        "pretokenizers": [
          {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
          s["pre_tokenizer"],
        ],
      }
    ),
    "drops separators",
  ),
}


@pytest.mark.parametrize("loss", LOSSY)
def test_refuses_what_loses_bytes(bpe_path: Path, tmp_path: Path, loss: str) -> None:
  change, message = LOSSY[loss]
  spec = json.loads(bpe_path.read_text())
  change(spec)
  (tmp_path / "lossy.json").write_text(json.dumps(spec))
  with pytest.raises(DataError, match=message):
    load_bpe(tmp_path / "lossy.json")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
  with pytest.raises(DataError, match="no such tokenizer file"):
    load_bpe(tmp_path / "nowhere.json")
  (tmp_path / "bad.json").write_text("{")
  with pytest.raises(DataError, match=r"bad\.json: not a tokenizer JSON file"):
    load_bpe(tmp_path / "bad.json")


def test_vocabulary_sizes_that_cannot_be(tmp_path: Path) -> None:
  with pytest.raises(DataError, match="256 holds nothing beyond"):
    train_bpe(CORPUS, vocabulary_size=256, path=tmp_path / "a.json")
  with pytest.raises(DataError, match=r"gives 2\d\d tokens, not 5000; use bpe:2\d\d"):
    train_bpe(CORPUS, vocabulary_size=5000, path=tmp_path / "a.json")
  assert not list(tmp_path.iterdir())


def test_bytes_that_are_not_utf8(bpe: BpeTokenizer) -> None:
  with pytest.raises(DataError, match="byte 2 of the text is not UTF-8"):
    bpe.encode(b"ab\xff")


def test_specs(bpe: BpeTokenizer, bpe_path: Path, tmp_path: Path) -> None:
  calls = []

  def text() -> str:
    calls.append(1)
    return CORPUS

  def make(spec: str) -> str:
    return make_tokenizer(spec, text=text, cache_dir=tmp_path).fingerprint

  assert make("byte") == ByteTokenizer().fingerprint
  assert make(str(bpe_path)) == bpe.fingerprint
  assert not calls
  assert make(f"bpe:{SIZE}") == bpe.fingerprint
  [path] = tmp_path.iterdir()
  stamp = path.stat().st_mtime_ns
  assert make(f"bpe:{SIZE}") == bpe.fingerprint
  assert path.stat().st_mtime_ns == stamp
  with pytest.raises(DataError, match="'many' is not a size"):
    make("bpe:many")
