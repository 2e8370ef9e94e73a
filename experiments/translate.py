"""One model that translates names from English into ten languages, GPipe's second task in small.

    ./launch/local.sh experiments/translate.py
    ./launch/local.sh experiments/translate.py --languages=af --run_dir=runs/translate-af

Names of countries, languages, currencies and scripts from Debian's iso-codes (the package
pycountry); an encoder-decoder Transformer, T(2,256,4) of 0.5M parameters, over 4 CPU devices, 1,000
steps of 64 names. Expected on two cores: about 5 minutes. Measured are the test names in Afrikaans,
Friulian and Nynorsk, which have fewest. The second command trains a model of the same size for one
language alone; docs/translate.md has the scores of both, and of names that are left in English. The
same command resumes; `--help` lists the flags.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxpipe.data.experiments.isocodes import STANDARDS
from jaxpipe.data.experiments.pairs import PairBatches, Pairs, in_batches
from jaxpipe.data.experiments.translation import LANGUAGES, TranslationData, prepare_translation
from jaxpipe.data.text.windows import Batch
from jaxpipe.models.translation import TranslationConfig, parse_shape, translation
from jaxpipe.training.command.cache import cache_folder
from jaxpipe.training.command.task import Task, TaskConfig
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.settings import free, same
from jaxpipe.training.tasks.bleu import bleu_scores
from jaxpipe.training.tasks.translator import Translator

# Names of districts and villages (iso3166-2) are the same in most languages.
NAMES = ",".join(standard for standard in STANDARDS if standard != "iso3166-2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateRun(TaskConfig):
  """The flags: those of every run, of the names, the model and the search."""

  languages: str = same(",".join(LANGUAGES), "to translate into, such as de,fr,sr@latin")
  standards: str = same(NAMES, f"whose names are translated, of {','.join(STANDARDS)}")
  vocabulary_size: int = same(1024, "subwords that all languages share")
  longest: int = same(20, "tokens of a source or target; longer names are left out")
  temperature: float = same(5.0, "T: a language of n names is drawn with probability ~ n^(1/T)")

  shape: str = same(
    "T(2,256,4)", "T(L,H,A): L layers a side, H hidden units, A heads; GPipe's name"
  )
  width: int = same(96, "model width D")
  head_width: int = same(0, "of each head; 0: D / A. GPipe's shapes have --width=1024, and 64")
  dropout: float = same(0.1, "rate after attention and MLP")
  label_smoothing: float = same(0.1, "share of the target's probability that all tokens share")

  validation_names: int = free(64, "names of each language that a validation goes over, at most")
  test_names: int = free(100, "names of each language that are translated at the end, at most")
  beams: int = free(4, "of the search for their translations; 1: greedy")


def prepare(config: TranslateRun) -> TranslationData:
  """Prepares the names that the flags ask for."""
  return prepare_translation(
    config.languages.split(","),
    standards=config.standards.split(","),
    vocabulary_size=config.vocabulary_size,
    longest=config.longest,
    cache_dir=cache_folder("", "data"),
  )


def model(config: TranslateRun, data: TranslationData) -> TranslationConfig:
  """Returns the configuration of the model that the flags ask for."""
  layers, hidden, heads = parse_shape(config.shape)
  return TranslationConfig(
    vocabulary_size=data.vocabulary.size,
    layers=layers,
    width=config.width,
    hidden=hidden,
    heads=heads,
    head_width=config.head_width,
    dropout=config.dropout,
    label_smoothing=config.label_smoothing,
  )


def validation_batches(pairs: Pairs, most: int, size: int) -> Iterable[Batch]:
  """Returns batches of at most `most` names of each language, always the same ones."""
  chosen = [pairs.of(language)[:most] for language in pairs.languages]
  return [pairs.batch(which) for which in in_batches(np.concatenate(chosen), size)]


def translate_test(
  config: TranslateRun, data: TranslationData, translate: Translator, params: Any
) -> str:
  """Translates test names; formats scores of every language, and some examples.

  Below each language stand the scores of the English names, as if they were translations.
  """
  lines = ["test names, translated, and below each language the English left as it is"]
  for language in data.test.languages:
    which = data.test.of(language)[: config.test_names]
    english, wanted = zip(*(data.test.texts[i] for i in which), strict=True)
    said = translate(params, data.test, which)
    lines += [score_line(language, said, wanted), score_line("", english, wanted)]
    lines += [f"    {a} -> {b} ({c})" for a, b, c in zip(english[:3], said, wanted, strict=False)]
  return "\n".join(lines)


def score_line(name: str, said: Sequence[str], wanted: Sequence[str]) -> str:
  scores = bleu_scores(said, wanted)
  return f"{name:10}" + "  ".join(f"{key} {value:5.1f}" for key, value in scores.items())


def build(config: TranslateRun) -> Task:
  data = prepare(config)
  stack = translation(model(config, data))
  batches = PairBatches(data.train, config.batch_size, config.seed, config.temperature)
  translator = Translator(stack=stack, vocabulary=data.vocabulary, beams=config.beams)

  return Task(
    stack=stack,
    batches=batches.__getitem__,
    validation=validation_batches(data.validation, config.validation_names, config.batch_size),
    summarize=lambda loss, metrics, weight: {
      "nats": metrics["nats"] / weight,
      "accuracy": metrics["correct"] / weight,
    },
    finish=lambda params, state: translate_test(config, data, translator, params),
    identity=batches.identity,
    data_line=f"names of iso-codes\n{data.table()}",
  )


DEFAULTS = TranslateRun(
  run_dir="runs/translate",
  batch_size=64,
  steps=1000,
  learning_rate=3e-3,
  warmup_steps=100,
  weight_decay=0.01,
  validate_every=250,
  checkpoint_every=500,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
