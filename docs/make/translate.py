"""Writes docs/translate.md: one model for all languages against models for one language each.

    .venv/bin/python docs/make/translate.py

Trains 3 + 9 models of one size on one device. The page says what is compared, and by which rules.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np
import optax

import jaxpipe
from experiments.translate import DEFAULTS, TranslateRun, model, prepare
from jaxpipe.data.experiments.pairs import PairBatches, Pairs, language_shares
from jaxpipe.data.experiments.translation import TranslationData
from jaxpipe.models.translation import translation
from jaxpipe.training.command.cache import cache_folder, use_compilation_cache
from jaxpipe.training.plan.optimizer import make_optimizer
from jaxpipe.training.tasks.bleu import bleu_scores
from jaxpipe.training.tasks.translator import Translator

PAGE = pathlib.Path(__file__).parents[1] / "translate.md"
SMALL = ("af", "fur", "nn")  # the languages with the fewest names
SEEDS = (0, 1, 2)
ALONE = 300  # steps of a model for one language
EVERY = 100  # steps between validations
SCORES = ("bleu", "char_bleu", "chrf", "exact")
COLUMNS = ("language", "test names", "model", "BLEU, words", "BLEU, characters", "chrF", "exact, %")


def train(config: TranslateRun, data: TranslationData) -> tuple[Translator, Any]:
  """Trains for all steps; returns the model, and the parameters that translate best.

  Best by BLEU over characters of the validation names of `SMALL`, as far as the data have them.
  """
  stack, optimizer = translation(model(config, data)), make_optimizer(config)
  batches = PairBatches(data.train, config.batch_size, config.seed, config.temperature)
  value_and_grad = jaxpipe.reference_value_and_grad(stack, microbatches=1)
  translator = Translator(stack=stack, vocabulary=data.vocabulary)

  @jax.jit
  def update(params, state, batch, key):
    (loss, _), grads = value_and_grad(params, batch, key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  key, best, kept, began = jax.random.key(config.seed), -1.0, None, time.perf_counter()
  params = stack.init(key, batches[0])
  state = optimizer.init(params)
  for step in range(config.steps):
    params, state, loss = update(params, state, batches[step], jax.random.fold_in(key, step))
    if (step + 1) % EVERY == 0:
      scores = score(translator, params, data.validation, *small_of(data))
      print(
        f"  {step + 1} {time.perf_counter() - began:.0f} s {loss:.3f} {show(scores)}", flush=True
      )
      if scores["char_bleu"] > best:
        best, kept = scores["char_bleu"], params
  return translator, kept


def small_of(data: TranslationData) -> list[str]:
  """Returns those of `SMALL` that the data have."""
  return [language for language in SMALL if language in data.train.languages]


def score(translator: Translator, params: Any, pairs: Pairs, *languages: str) -> dict[str, float]:
  """Translates the names of some languages greedily and returns their scores, by name of score."""
  which = np.concatenate([pairs.of(language) for language in languages])
  return bleu_scores(translator(params, pairs, which), [pairs.texts[i][1] for i in which])


def show(scores: dict[str, float]) -> str:
  """Returns scores as a line for the log."""
  return " ".join(f"{name} {value:.1f}" for name, value in scores.items())


def copied(data: TranslationData, language: str) -> dict[str, float]:
  """Returns the scores of the English source itself, taken for the translation."""
  english, wanted = zip(*(data.test.texts[i] for i in data.test.of(language)), strict=True)
  return bleu_scores(english, wanted)


def measure(seed: int, languages: str, steps: int) -> dict[str, dict[str, float]]:
  """Trains one model on some languages; returns language -> scores of its test names."""
  config = dataclasses.replace(DEFAULTS, seed=seed, languages=languages, steps=steps)
  data = prepare(config)
  print(f"{languages}, seed {seed}", flush=True)
  translator, params = train(config, data)
  found = {one: score(translator, params, data.test, one) for one in small_of(data)}
  for one, scores in found.items():
    print(f"  {one}: {show(scores)}", flush=True)
  return found


def cell(runs: list[dict[str, float]], key: str) -> str:
  """Returns a cell of the table: the mean of a score over runs, and the score of each."""
  values = [run[key] for run in runs]
  return f"{np.mean(values):.1f} ({' '.join(f'{value:.1f}' for value in values)})"


def rules(data: TranslationData) -> str:
  """Returns the text above the table: what is compared, and how."""
  languages, counts = data.train.languages, data.train.counts
  shares = language_shares(counts.tolist(), DEFAULTS.temperature)
  names = ", ".join(f"{one} {n:,}" for one, n in zip(languages, counts, strict=True))
  words = [[len(data.test.texts[i][1].split()) for i in data.test.of(one)] for one in SMALL]
  mean = ", ".join(f"{np.mean(each):.1f}" for each in words)
  four = ", ".join(str(sum(max(n - 3, 0) for n in each)) for each in words)
  more = ALONE / DEFAULTS.steps
  times = ", ".join(f"{one} {more / shares[languages.index(one)]:.1f}" for one in SMALL)
  return f"""# One model for ten languages

Written by `.venv/bin/python docs/make/translate.py`.

Names of Debian's iso-codes are translated from English. They are split by the English alone, so
that no test name is seen in training in any language. Training names: {names}.

*Ten languages*: one model, {DEFAULTS.shape} of width {DEFAULTS.width}, for all; a language of n
names is drawn with p ~ n^(1/{DEFAULTS.temperature:.0f}). *One language*: a model of the same size,
vocabulary and settings for each language alone. *English*: the source as it is.

The one model trains for {DEFAULTS.steps} steps of {DEFAULTS.batch_size} names, the others for
{ALONE}, in which they see more examples of their language than it does ({times} times as many). All
are taken at the best of a validation every {EVERY} steps, by BLEU over characters of the validation
names of their language, or of the three below.

Scores are sacrebleu's, of greedy translations of the test names: the mean of three seeds, and of
each. BLEU over words is `tokenize=13a`, over characters `tokenize=char`. BLEU counts sequences of
up to four; the test names have {mean} words on average, and all of them together {four} sequences
of four words ({", ".join(SMALL)}). So BLEU over words hangs on a few names, and BLEU over
characters is what is compared.
"""


def page(together: list[dict], alone: dict[str, list[dict]]) -> str:
  """Returns the whole page, from the runs of the one model and of each language's own."""
  data = prepare(DEFAULTS)
  lines = [rules(data), f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
  for one in SMALL:
    rows = {
      "English": [copied(data, one)],
      "one language": alone[one],
      "**ten languages**": [run[one] for run in together],
    }
    for name, runs in rows.items():
      cells = " | ".join(cell(runs, key) for key in SCORES)
      lines.append(f"| {one} | {len(data.test.of(one))} | {name} | {cells} |")
  return "\n".join(lines) + "\n"


def main() -> None:
  """Trains all models, and writes the page."""
  # Models of other seeds are the same programs.
  use_compilation_cache(cache_folder("", "programs"))
  together, alone = [], {one: [] for one in SMALL}
  for seed in SEEDS:
    together.append(measure(seed, DEFAULTS.languages, DEFAULTS.steps))
    for one in SMALL:
      alone[one] += [measure(seed, one, ALONE)[one]]
  PAGE.write_text(page(together, alone))


if __name__ == "__main__":
  main()
