"""A translator says what its model says, whatever the batch and the beams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.data.experiments.pairs import BEGIN, END, PAD, PairVocabulary, encode_pairs
from jaxpipe.data.text.tokenizer import ByteTokenizer
from jaxpipe.models.translation import TranslationConfig, translation
from jaxpipe.stack.forward import modules, run_layers
from jaxpipe.training.tasks.translator import Translator

NAMES = ["Oman", "Iran", "Chad", "Niger", "Togo"]
CATALOGUE = {"de": {name: name for name in NAMES}, "af": {"Oman": "Oman"}}
VOCABULARY = PairVocabulary(ByteTokenizer(), ("de", "af"))
PAIRS = encode_pairs(CATALOGUE, VOCABULARY, 8)


@pytest.fixture(scope="module")
def trained():
  """A model far from its first values, so that it says this and that."""
  shape = dict(vocabulary_size=VOCABULARY.size, layers=1, width=8, hidden=16, heads=2)
  stack = translation(TranslationConfig(**shape))
  params = stack.init(jax.random.key(5), PAIRS.batch(np.arange(2)))
  return stack, jax.tree.map(lambda p: 3 * p, params)


def logits(stack, params, batch):
  embed, *layers, head = modules(stack, params, {})
  return head.logits(run_layers(layers, embed(batch), batch))


def test_greedy_decoding_is_the_argmax_of_the_teacher_forced_model(trained):
  stack, params = trained
  source = PAIRS.batch(PAIRS.of("de"))["source"]
  said = np.asarray(Translator(stack=stack, vocabulary=VOCABULARY).search(params, source))
  tokens = np.concatenate([np.full((5, 1), BEGIN), said[:, :-1]], axis=1).astype(np.int32)
  forced = np.array(logits(stack, params, {"source": source, "tokens": tokens}))
  forced[..., [PAD, BEGIN]] = -np.inf
  best = forced.argmax(axis=-1)
  ended = np.cumsum(said == END, axis=1) - (said == END) > 0
  assert not ended.all(axis=1).any() and len(np.unique(said)) > 4
  np.testing.assert_array_equal(said, np.where(ended, PAD, best))


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_do_not_meet(trained, beams):
  stack, params = trained
  one = Translator(stack=stack, vocabulary=VOCABULARY, batch_size=5, beams=beams)
  by_two = Translator(stack=stack, vocabulary=VOCABULARY, batch_size=2, beams=beams)
  german = PAIRS.of("de")
  together = one(params, PAIRS, german)
  assert together == by_two(params, PAIRS, german)
  assert together[::-1] == one(params, PAIRS, german[::-1])
  assert len(together) == len(NAMES) and len(set(together)) > 1
  assert one(params, PAIRS, PAIRS.of("af"))[0] != together[0]  # another tag, another answer


def test_the_search_maximizes_what_the_model_says(trained):
  stack, params = trained
  source = jnp.asarray(PAIRS.batch(PAIRS.of("de"))["source"])
  scores = []
  for beams in (1, 8):
    translator = Translator(stack=stack, vocabulary=VOCABULARY, beams=beams)
    said = np.asarray(translator.search(params, source))
    tokens = np.concatenate([np.full((5, 1), BEGIN), said[:, :-1]], axis=1).astype(np.int32)
    out = logits(stack, params, {"source": source, "tokens": tokens})
    out = out.at[..., jnp.array([PAD, BEGIN])].set(-jnp.inf)
    logs = np.asarray(jax.nn.log_softmax(out))
    each = np.take_along_axis(logs, said[..., None], -1)[..., 0]
    length = (said != PAD).sum(axis=1)
    total = np.where(said != PAD, each, 0).sum(axis=1)
    scores.append(total / ((5 + length) / 6) ** 0.6)
  assert scores[1].mean() > scores[0].mean()
