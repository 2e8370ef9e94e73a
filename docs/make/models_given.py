"""The models of docs/make/models.py as their packages make them: tiny, with random values.

Each `make_` function takes a dropout rate and returns an `Original`, which the pipeline is compared
with: the model's own call, and `jax.grad` or `nnx.grad` of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

B, T = 8, 6  # rows of a batch, tokens of a row
D, VOCABULARY, CLASSES = 16, 31, 3
KEY = jax.random.key(0)
Tree = Any


@dataclasses.dataclass(frozen=True)
class Original:
  """A model as its package made it, with random values.

  Attributes:
    variables: its values: `params`, and beside them what else the model keeps.
    bound: variables -> the model holding them, a bound Linen module or an NNX module.
    call: `(variables, batch) -> y`, the model in evaluation as its package calls it.
    gradient: `batch -> gradient of the mean loss`, in training, of the structure of the `params`.
  """

  variables: Tree
  bound: Callable[[Tree], Any]
  call: Callable[[Tree, Tree], jax.Array]
  gradient: Callable[[Tree], Tree]


def loss(y: jax.Array, batch: Tree) -> jax.Array:
  """Returns the cross-entropy of every label."""
  return optax.softmax_cross_entropy_with_integer_labels(y, batch["label"])


def shaken(variables: Tree) -> Tree:
  """Adds a random tenth to every value, for models that begin with zeros and ones."""
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  added = [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, added)


def of_transformers(model: Any, arguments: Callable[[Tree], dict[str, Any]]) -> Original:
  """Wraps a Flax model of `transformers`.

  Args:
    model: it, with fresh parameters.
    arguments: a batch -> what the model is called with.
  """
  variables = {"params": shaken(model.params)}

  def call(variables: Tree, batch: Tree) -> jax.Array:
    return model(**arguments(batch), params=variables["params"]).logits

  def gradient(batch: Tree) -> Tree:
    def mean(params: Tree) -> jax.Array:
      out = model(**arguments(batch), params=params, dropout_rng=KEY, train=True)
      return loss(out.logits, batch).mean()

    return jax.grad(mean)(variables["params"])

  return Original(variables, model.module.bind, call, gradient)


def of_nnx(
  model: nnx.Module, *arguments: str, take: Callable[[Any], Any] = lambda y: y
) -> Original:
  """Wraps an NNX model.

  Args:
    model: it, in the mode in which it trains.
    arguments: names of entries of the batch that it is called with; "" for None.
    take: picks the logits from what it returns.
  """
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  variables = {"params": shaken(params)}
  bound = lambda variables: nnx.merge(graph, variables["params"], rest, copy=True)  # noqa: E731

  def called(model: Any, batch: Tree) -> jax.Array:
    return take(model(*(batch[name] if name else None for name in arguments)))

  def call(variables: Tree, batch: Tree) -> jax.Array:
    evaluating = bound(variables)
    evaluating.eval()
    return called(evaluating, batch)

  def gradient(batch: Tree) -> Tree:
    return nnx.grad(lambda model: loss(called(model, batch), batch).mean())(bound(variables))

  return Original(variables, bound, call, gradient)


def tokens(shape: tuple[int, ...], below: int, seed: int = 0) -> np.ndarray:
  """Returns random integers of a shape, as a batch has them."""
  return np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)


def make_bert(rate: float) -> Original:
  """Returns BERT that classifies, two layers."""
  from transformers import BertConfig, FlaxBertForSequenceClassification

  config = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=2 * D,
    max_position_embeddings=T,
    hidden_dropout_prob=rate,
    attention_probs_dropout_prob=rate,
    num_labels=CLASSES,
  )
  names = dict(
    input_ids="x", attention_mask="mask", token_type_ids="types", position_ids="positions"
  )
  model = FlaxBertForSequenceClassification(config, input_shape=(1, T))
  return of_transformers(model, lambda batch: {name: batch[of] for name, of in names.items()})


def make_gpt2(rate: float) -> Original:
  """Returns GPT-2 with its head, two blocks, whose embedding is tied."""
  from transformers import FlaxGPT2LMHeadModel, GPT2Config

  config = GPT2Config(
    vocab_size=VOCABULARY,
    n_embd=D,
    n_layer=2,
    n_head=2,
    n_positions=T,
    resid_pdrop=rate,
    embd_pdrop=rate,
    attn_pdrop=rate,
  )
  names = dict(input_ids="x", attention_mask="mask", position_ids="positions")
  model = FlaxGPT2LMHeadModel(config, input_shape=(1, T))
  return of_transformers(model, lambda batch: {name: batch[of] for name, of in names.items()})


def make_vit(rate: float) -> Original:
  """Returns ViT that classifies pictures of 8x8, two layers."""
  from transformers import FlaxViTForImageClassification, ViTConfig

  config = ViTConfig(
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=2 * D,
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_labels=CLASSES,
    hidden_dropout_prob=rate,
    attention_probs_dropout_prob=rate,
  )
  # The model's own call wants channels first, and its modules channels last.
  return of_transformers(
    FlaxViTForImageClassification(config),
    lambda batch: {"pixel_values": batch["x"].transpose(0, 3, 1, 2)},
  )


def make_qwen3(rate: float) -> Original:
  """Returns Qwen3, two layers, whose embedding is tied."""
  model = module_without_package("tunix", "models.qwen3.model")
  config = model.ModelConfig(
    num_layers=2,
    vocab_size=VOCABULARY,
    embed_dim=D,
    hidden_dim=2 * D,
    num_heads=2,
    head_dim=8,
    num_kv_heads=1,
    rope_theta=10_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
  )
  own = model.Qwen3(config, rngs=nnx.Rngs(0))
  return of_nnx(own, "x", "positions", "", "mask", take=lambda out: out[0])


def module_without_package(package: str, name: str) -> Any:
  """Imports a module of a package whose `__init__` imports what is not installed."""
  spec = importlib.util.find_spec(package)
  if package not in sys.modules and spec is not None:
    sys.modules[package] = importlib.util.module_from_spec(spec)  # which does not run it
  return importlib.import_module(f"{package}.{name}")


def make_resnet(rate: float) -> Original:
  """Returns a ResNet of two blocks; its norms take the statistics of each microbatch."""
  import jax_resnet

  model = jax_resnet.ResNet(
    jax_resnet.ResNetBlock, stage_sizes=(1, 1), hidden_sizes=(4, 8), n_classes=CLASSES
  )
  variables = shaken(dict(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))))

  def gradient(batch: Tree) -> Tree:
    def mean(params: Tree) -> jax.Array:
      every = {**variables, "params": params}
      y, _ = model.apply(every, batch["x"], mutable=["batch_stats"])
      return loss(y, batch).mean()

    return jax.grad(mean)(variables["params"])

  return Original(variables, model.bind, lambda v, batch: model.apply(v, batch["x"]), gradient)


class Rnn(nnx.Module):
  """Two recurrent layers that classify by the last state."""

  def __init__(self, rate: float, rngs: nnx.Rngs) -> None:
    self.embed = nnx.Embed(VOCABULARY, D, rngs=rngs)
    self.first = nnx.RNN(nnx.LSTMCell(D, D, rngs=rngs), rngs=rngs)
    self.second = nnx.RNN(nnx.GRUCell(D, D, rngs=rngs), rngs=rngs)
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.out = nnx.Linear(D, CLASSES, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.second(self.first(self.embed(x)))
    return self.out(self.dropout(x[:, -1]))


def make_rnn(rate: float) -> Original:
  """Returns the recurrent model."""
  return of_nnx(Rnn(rate, nnx.Rngs(0)), "x")


# What the models are trained on.
PADDED = np.repeat(np.arange(T)[None] < T - 2, B, 0).astype(np.int32)
CAUSAL = np.tile(np.tril(np.ones((T, T), bool)), (B, 1, 1))
TEXT = {"x": tokens((B, T), VOCABULARY), "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1))}
ONE, EVERY = {"label": tokens((B,), CLASSES, 1)}, {"label": tokens((B, T), VOCABULARY, 1)}


def pictures(size: int) -> np.ndarray:
  """Returns random pictures."""
  return np.random.default_rng(0).normal(size=(B, size, size, 1)).astype(np.float32)
