"""Compares one model for all languages with models of its size for one language each.

  .venv/bin/python docs/make_translate.py

Trains 3 + 9 models on one device, and writes docs/translate.md. What is compared, and by which
rules, the page says.
"""

import dataclasses
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax

import jaxpipe
from experiments.translate import DEFAULTS, TranslateRun, model, prepare
from jaxpipe.data.pairs import PairBatches, Pairs, in_batches, language_shares
from jaxpipe.data.translation import TranslationData
from jaxpipe.models.stack import LayerStack
from jaxpipe.models.translation import translation
from jaxpipe.training.bleu import bleu_scores
from jaxpipe.training.optimizer import make_optimizer
from jaxpipe.training.translate import Translator, modules, pass_through

PAGE = pathlib.Path(__file__).with_name("translate.md")
SMALL = ("af", "fur", "nn")  # the languages with the fewest names
SEEDS = (0, 1, 2)
EVERY = 100  # steps between validations
SCORES = ("bleu", "char_bleu", "chrf", "exact")
COLUMNS = ("language", "test names", "model", "BLEU, words", "BLEU, characters", "chrF", "exact, %")


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model at its best validation."""

  stack: LayerStack
  params: dict
  step: int
  nats: float
  seconds: float


def train(config: TranslateRun, data: TranslationData) -> Trained:
  """Trains for all steps; keeps the parameters that are best on validation names of `SMALL`."""
  stack, optimizer = translation(model(config, data)), make_optimizer(config)
  batches = PairBatches(data.train, config.batch_size, config.seed, config.temperature)
  value_and_grad = jaxpipe.reference_value_and_grad(stack, microbatches=1)
  evaluate = jax.jit(lambda params, batch: nats(stack, params, batch))
  held = small_batches(data.validation, config.batch_size)

  @jax.jit
  def update(params, state, batch, key):
    _, grads = value_and_grad(params, batch, key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  key, best, began = jax.random.key(config.seed), None, time.perf_counter()
  params = stack.init(key, batches[0])
  state = optimizer.init(params)
  for step in range(config.steps):
    params, state = update(params, state, batches[step], jax.random.fold_in(key, step))
    if (step + 1) % EVERY == 0:
      sums = np.sum([jax.device_get(evaluate(params, batch)) for batch in held], axis=0)
      found = float(sums[0] / sums[1])
      seconds = time.perf_counter() - began
      print(f"  {step + 1} {found:.4f} {seconds:.0f} s", flush=True)
      if best is None or found < best.nats:
        best = Trained(stack, params, step + 1, found, seconds)
  return dataclasses.replace(best, seconds=time.perf_counter() - began)


def nats(stack: LayerStack, params: dict, batch: dict) -> tuple:
  """Summed cross-entropy of a batch, and its number of targets."""
  embed, *layers, head = modules(stack, params)
  _, weight, metrics = head(pass_through(layers, embed(batch), batch), batch)
  return metrics["nats"], weight


def small_batches(pairs: Pairs, size: int) -> list[dict]:
  """All names of the small languages that there are."""
  which = np.concatenate([pairs.of(one) for one in SMALL if one in pairs.languages])
  return [pairs.batch(piece) for piece in in_batches(which, size)]


def score(trained: Trained, data: TranslationData, language: str) -> dict[str, float]:
  """What the model says of the test names of a language, greedily."""
  translate = Translator(stack=trained.stack, vocabulary=data.vocabulary)
  wanted = [data.test.texts[i][1] for i in data.test.of(language)]
  return bleu_scores(translate(trained.params, data.test, language), wanted)


def copied(data: TranslationData, language: str) -> dict[str, float]:
  """The English left as it is."""
  english, wanted = zip(*(data.test.texts[i] for i in data.test.of(language)), strict=True)
  return bleu_scores(english, wanted)


def measure(seed: int, languages: str) -> dict[str, dict[str, float]]:
  """Language -> scores, of one model trained on some languages."""
  config = dataclasses.replace(DEFAULTS, seed=seed, languages=languages)
  data = prepare(config)
  print(f"{languages}, seed {seed}", flush=True)
  trained = train(config, data)
  found = {one: score(trained, data, one) for one in SMALL if one in data.test.languages}
  for scores in found.values():
    scores.update(step=trained.step, seconds=trained.seconds)
  print(f"  best at {trained.step}: {found}", flush=True)
  return found


def cell(runs: list[dict[str, float]], key: str) -> str:
  """Mean and each."""
  values = [run[key] for run in runs]
  return f"{np.mean(values):.1f} ({' '.join(f'{value:.1f}' for value in values)})"


def rules(data: TranslationData) -> str:
  """What is compared, and how."""
  languages, counts = data.train.languages, data.train.counts
  shares = language_shares(counts.tolist(), DEFAULTS.temperature)
  names = ", ".join(f"{one} {n:,}" for one, n in zip(languages, counts, strict=True))
  times = ", ".join(f"{one} {1 / shares[languages.index(one)]:.0f}" for one in SMALL)
  return f"""# One model for ten languages

Written by `.venv/bin/python docs/make_translate.py`.

Names of Debian's iso-codes are translated from English. They are split by the English alone, so that
no test name is seen in training in any language. Training names: {names}.

*Ten languages*: one model, {DEFAULTS.shape} of width {DEFAULTS.width}, for all; a language of n names
is drawn with p ~ n^(1/{DEFAULTS.temperature:.0f}). *One language*: a model of the same size,
vocabulary and settings for each language alone. All train for {DEFAULTS.steps} steps of
{DEFAULTS.batch_size} names, so that the second sees more examples of its language than the first
does ({times} times as many), and all are taken at their best of a validation every {EVERY} steps, on
the validation names of the three languages below that the model is for. *English*: the source as it is.

Scores are sacrebleu's, of greedy translations of the test names: the mean of three seeds, and each.
BLEU over words is `tokenize=13a`, over characters `tokenize=char`.
"""


def page(together: list[dict], alone: dict[str, list[dict]]) -> str:
  """The page."""
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
  """Trains, measures, writes."""
  together = [measure(seed, DEFAULTS.languages) for seed in SEEDS]
  alone = {one: [measure(seed, one)[one] for seed in SEEDS] for one in SMALL}
  PAGE.write_text(page(together, alone))


if __name__ == "__main__":
  main()
