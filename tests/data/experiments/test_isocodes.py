"""Names of iso-codes: what is read, and that no English name is on two sides of the split."""

import collections

import pytest

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.isocodes import (
  SPLITS,
  STANDARDS,
  available_languages,
  read_catalogue,
  split_catalogue,
  split_of,
)

pytest.importorskip("pycountry")
SMALL = ("iso3166-1", "iso3166-3", "iso4217")


def test_known_names_are_read():
  names = read_catalogue(["de", "af", "sr@latin"], SMALL)
  assert list(names) == ["de", "af", "sr@latin"]
  assert names["de"]["Germany"] == "Deutschland"
  assert names["de"]["Federal Republic of Germany"] == "Bundesrepublik Deutschland"
  assert names["de"]["Swiss Franc"] == "Schweizer Franken"
  assert names["af"]["Germany"] == "Duitsland"


def test_what_is_not_translated_is_left_out():
  # Afrikaans has no catalogue of currencies, and of countries not all.
  names = read_catalogue(["af", "de"], SMALL)
  assert "Swiss Franc" not in names["af"]
  assert 0 < len(names["af"]) < len(names["de"])
  assert all(there for language in names.values() for there in language.values())


def test_there_are_many_languages_some_with_little():
  languages = available_languages()
  assert len(languages) > 100 and languages == sorted(languages)
  assert {"de", "pt_BR", "sr@latin", "fur"} <= set(languages)


def test_no_source_is_in_two_splits_of_any_languages():
  catalogue = read_catalogue(["de", "af", "nn", "tr"], STANDARDS)
  parts = {split: split_catalogue(catalogue, split) for split in SPLITS}
  seen = {
    split: {name.casefold() for names in part.values() for name in names}
    for split, part in parts.items()
  }
  assert not (seen["train"] & seen["test"] or seen["train"] & seen["validation"])
  assert not seen["validation"] & seen["test"]
  for language, names in catalogue.items():
    assert sum(len(part[language]) for part in parts.values()) == len(names)


def test_the_split_is_as_it_always_was():
  # A model trained yesterday must not be tested tomorrow on what it was trained on.
  assert [split_of(name) for name in ("Germany", "Malta", "Zulu")] == ["train", "test", "train"]
  assert split_of("GERMANY") == split_of("germany")
  counts = collections.Counter(split_of(str(i)) for i in range(10_000))
  assert [round(counts[split] / 1000) for split in SPLITS] == [7, 1, 2]


def test_unknown_names_are_refused():
  with pytest.raises(DataError, match=r"no names in 'xx'; use one of .*\bzu\b"):
    read_catalogue(["xx"], SMALL)
  with pytest.raises(DataError, match=r"standard 'iso9' is unknown; use some of iso3166-1"):
    read_catalogue(["de"], ["iso9"])


def test_a_missing_package_is_told(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(DataError, match="pycountry is not installed"):
    available_languages()
