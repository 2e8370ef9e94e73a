"""The glue of docs/make/models.py: what a user writes to pipeline a model that others wrote.

One function for each model: it takes the model, holding its variables, and returns its own modules
in a row, as `jaxpipe.pipeline` wants them. The page counts these lines and shows them.
"""

from flax import linen as nn
from flax import nnx

import jaxpipe


def holding(module, **inner):
  """Makes a Linen module of bound ones, and binds it to their variables."""
  parts = {name: one.unbind() for name, one in inner.items()}
  params = {name: values.get("params", {}) for name, (_, values) in parts.items()}
  return module(**{name: one for name, (one, _) in parts.items()}).bind({"params": params})


class First(nn.Module):
  """Takes x out of the tuple that a layer of `transformers` returns."""

  inner: nn.Module

  def __call__(self, x, deterministic, **entries):
    return self.inner(x, deterministic=deterministic, **entries)[0]


class BertLayer(nn.Module):
  """The same, of a layer that wants a head mask too."""

  inner: nn.Module

  def __call__(self, x, mask, deterministic):
    return self.inner(x, mask, None, deterministic=deterministic)[0]


def bert(model):
  """FlaxBertForSequenceClassification."""
  embed = dict(token_type_ids="types", position_ids="positions", attention_mask="mask")
  layers = [holding(BertLayer, inner=layer) for layer in model.bert.encoder.layer.layers]
  return [
    jaxpipe.layer(model.bert.embeddings, **embed),
    *(jaxpipe.layer(layer, mask="mask") for layer in layers),
    model.bert.pooler,
    model.dropout,
    model.classifier,
  ]


class Gpt2Embed(nn.Module):
  """What FlaxGPT2Module does before its blocks."""

  wte: nn.Module
  wpe: nn.Module
  dropout: nn.Module

  def __call__(self, x, positions, deterministic):
    return self.dropout(self.wte(x) + self.wpe(positions), deterministic=deterministic)


class Gpt2Head(nn.Module):
  """What FlaxGPT2LMHeadModule does behind its blocks."""

  ln_f: nn.Module
  wte: nn.Module

  def __call__(self, x):
    return self.wte.attend(self.ln_f(x))


def gpt2(model):
  """FlaxGPT2LMHeadModel; its first and its last module hold one table, which is tied."""
  inner = model.transformer
  embed = holding(Gpt2Embed, wte=inner.wte, wpe=inner.wpe, dropout=inner.dropout)
  blocks = [holding(First, inner=block) for block in inner.h.blocks]
  return [
    jaxpipe.layer(embed, positions="positions"),
    *(jaxpipe.layer(block, attention_mask="mask") for block in blocks),
    holding(Gpt2Head, ln_f=inner.ln_f, wte=inner.wte),
  ]


def vit(model):
  """FlaxViTForImageClassification."""
  layers = [holding(First, inner=layer) for layer in model.vit.encoder.layer.layers]
  token = lambda x: x[:, 0]  # noqa: E731
  return [model.vit.embeddings, *layers, model.vit.layernorm, token, model.classifier]


class Qwen3Layer(nnx.Module):
  """A layer without its cache."""

  def __init__(self, inner):
    self.inner = inner

  def __call__(self, x, positions, mask):
    return self.inner(x, positions, None, mask)[1]


def qwen3(model):
  """Qwen3; the embedder that its first and its last module share is one."""
  entries = dict(positions="positions", mask="mask")
  layers = [jaxpipe.layer(Qwen3Layer(layer), **entries) for layer in model.layers]
  return [model.embedder.encode, *layers, model.final_norm, model.embedder.decode]


def resnet(model):
  """ResNet, whose variables are named by the numbers of its layers."""
  own = lambda i: {name: of.get(f"layers_{i}", {}) for name, of in model.variables.items()}  # noqa: E731
  is_module = lambda layer: isinstance(layer, nn.Module)  # noqa: E731
  return [x.bind(own(i)) if is_module(x) else x for i, x in enumerate(model.layers)]


def rnn(model):
  """Two layers of `nnx.RNN`."""
  last = lambda x: x[:, -1]  # noqa: E731
  return [model.embed, model.first, model.second, last, model.dropout, model.out]
