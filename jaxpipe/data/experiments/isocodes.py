"""Reads names of countries, languages, scripts and currencies in English and up to 170 languages.

The catalogues are those of Debian's iso-codes (https://salsa.debian.org/iso-codes-team/iso-codes,
LGPL-2.1-or-later), which the package `pycountry` ships; they are read where it is installed, and no
name is copied into this repository. A catalogue says what some of the English names are in one
language: from thousands of names, for German, down to a few hundred or a handful. That is the
setting of multilingual translation: languages with little of their own gain from the others
(Johnson et al., arXiv:1611.04558; Arivazhagan et al., arXiv:1907.05019, GPipe's second task).

A name is in the training, validation or test split by itself alone, never by language or standard:
no English name of the test split is seen in training in any language.
"""

from __future__ import annotations

import gettext
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Mapping

from jaxpipe.data.errors import DataError

SPLITS = ("train", "validation", "test")

# What each standard names: countries, their parts, former countries, currencies, languages,
# families of languages, scripts.
STANDARDS = (
  "iso3166-1",
  "iso3166-2",
  "iso3166-3",
  "iso4217",
  "iso639-3",
  "iso639-5",
  "iso15924",
)

# Of every entry of a standard, what is translated.
_FIELDS = ("name", "official_name", "common_name", "inverted_name")

# Language -> English -> that language.
Catalogue = Mapping[str, Mapping[str, str]]


class _Untranslated(gettext.NullTranslations):
  """The fallback of a catalogue that lacks a name: gettext itself would return the English one."""

  def gettext(self, message: str) -> str:
    return ""


def available_languages(standards: Iterable[str] = STANDARDS) -> list[str]:
  """Returns the codes of all languages that have a catalogue of one of the standards, sorted.

  Raises:
    DataError: pycountry is not installed.
  """
  folders = (_root() / "locales").iterdir()
  return sorted(
    folder.name
    for folder in folders
    if any(_file(folder.name, standard).is_file() for standard in standards)
  )


def read_catalogue(
  languages: Iterable[str], standards: Iterable[str] = STANDARDS
) -> dict[str, dict[str, str]]:
  """Reads what English names are called in other languages.

  Args:
    languages: codes as in `available_languages`, such as `de`, `pt_BR` or `sr@latin`.
    standards: whose names, of `STANDARDS`; where two translate one name, the earlier counts.

  Returns:
    Language -> English name -> its name there, both in the order given; English names sorted.

  Raises:
    DataError: pycountry is not installed, or an unknown language or standard.
  """
  standards = tuple(standards)
  for standard in standards:
    if standard not in STANDARDS:
      raise DataError(f"standard {standard!r} is unknown; use some of {', '.join(STANDARDS)}")
  names = {standard: _english(standard) for standard in standards}
  return {language: _read_language(language, names) for language in languages}


def split_of(name: str) -> str:
  """Returns the split of an English name: of ten, seven are `train`, one `validation`, two `test`.

  Case does not count, so that one name in two standards is on one side.
  """
  draw = int.from_bytes(hashlib.sha256(name.casefold().encode()).digest()[:8], "little") % 10
  return SPLITS[0 if draw < 7 else 1 if draw < 8 else 2]


def split_catalogue(catalogue: Catalogue, split: str) -> dict[str, dict[str, str]]:
  """Returns the part of a catalogue whose English names are in one split, of `SPLITS`."""
  return {
    language: {name: there for name, there in names.items() if split_of(name) == split}
    for language, names in catalogue.items()
  }


def _read_language(language: str, names: Mapping[str, list[str]]) -> dict[str, str]:
  """Looks the English names of some standards up in the catalogues of one language."""
  found: dict[str, str] = {}
  files = {standard: _file(language, standard) for standard in names}
  if not any(file.is_file() for file in files.values()):
    raise DataError(
      f"there are no names in {language!r}; use one of {', '.join(available_languages(names))}"
    )
  for standard, file in files.items():
    if not file.is_file():
      continue
    with file.open("rb") as stream:
      translations = gettext.GNUTranslations(stream)
    translations.add_fallback(_Untranslated())
    for name in names[standard]:
      if there := translations.gettext(name):
        found.setdefault(name, there)
  return dict(sorted(found.items()))


def _english(standard: str) -> list[str]:
  """All English names of a standard, sorted."""
  text = (_root() / "databases" / f"{standard}.json").read_text(encoding="utf-8")
  (entries,) = json.loads(text).values()
  return sorted({entry[field] for entry in entries for field in _FIELDS if field in entry})


def _file(language: str, standard: str) -> pathlib.Path:
  return _root() / "locales" / language / "LC_MESSAGES" / f"{standard}.mo"


def _root() -> pathlib.Path:
  # Found, not imported: only its files are wanted.
  spec = importlib.util.find_spec("pycountry")
  if spec is None or not spec.submodule_search_locations:
    raise DataError("pycountry is not installed, whose names are translated; pip install pycountry")
  return pathlib.Path(spec.submodule_search_locations[0])
