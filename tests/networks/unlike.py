"""Small float64 stacks whose layers are unlike: shapes, dtypes, state, ties, loops."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe.stack.stack import LayerStack

V, D, T = 11, 6, 5


def dense(rngs, *sizes):
  return nnx.Linear(*sizes, rngs=rngs, param_dtype=jnp.float64)


class Images(nnx.Module):
  """Picks the images out of the batch; it has no parameters."""

  def __init__(self, rngs):
    pass

  def __call__(self, batch):
    return batch["image"]


class Convolution(nnx.Module):
  """Shrinks and widens; normalised over the batch, with dropout."""

  def __init__(self, rngs, *, features, stride=1):
    make = lambda rngs, n: nnx.Conv(  # noqa: E731
      *features, (3, 3), strides=n, rngs=rngs, param_dtype=jnp.float64
    )
    self.inner = make(rngs, stride)
    self.norm = nnx.BatchNorm(features[1], rngs=rngs, param_dtype=jnp.float64)
    # Statistics start as float32; these are exact in sums.
    self.norm.mean = nnx.BatchStat(jnp.zeros(features[1], jnp.float64))
    self.norm.var = nnx.BatchStat(jnp.ones(features[1], jnp.float64))

  def __call__(self, x, context):
    return context.dropout(jnp.tanh(self.norm(self.inner(x))), 0.1)


class Classify(nnx.Module):
  def __init__(self, rngs):
    self.out = dense(rngs, 6, 3)

  def __call__(self, x, batch):
    return classified(self.out(x.mean((1, 2))), batch["label"])


def classified(logits, labels):
  losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
  correct = jnp.sum(logits.argmax(-1) == labels)
  return losses.sum(), 1.0 * labels.size, {"correct": correct}


def convolutions(**options):
  """Five layers with BatchNorm, dropout and shapes that change."""
  sizes = [((1, 4), 1), ((4, 4), 1), ((4, 6), 2), ((6, 6), 1), ((6, 6), 1)]
  build = lambda features, stride: lambda rngs: Convolution(rngs, features=features, stride=stride)  # noqa: E731
  layers = [build(*size) for size in sizes]
  return LayerStack(embed=Images, layers=layers, head=Classify, **options)


def images(rows):
  rng = np.random.default_rng(0)
  return {"image": rng.normal(size=(rows, 6, 6, 1)), "label": rng.integers(0, 3, rows)}


class Tokens(nnx.Module):
  def __init__(self, rngs):
    pass

  def __call__(self, batch):
    return batch["tokens"]


class Lookup(nnx.Module):
  """Whole numbers in, a dict out."""

  def __init__(self, rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float64))

  def __call__(self, tokens):
    return {"h": self.table[...][tokens], "tokens": tokens, "past": ()}


class Mix(nnx.Module):
  """Grows its x by what it was given, as a skip connection for later layers."""

  def __init__(self, rngs):
    self.base = dense(rngs, D, D)

  def __call__(self, x, context):
    h = x["h"] + context.dropout(jnp.tanh(self.base(x["h"])), 0.2)
    return {**x, "h": h, "past": (*x["past"], x["h"])}


class Adapted(nnx.Module):
  """A base that is another's, and an adapter of its own: one set of weights at several depths."""

  def __init__(self, rngs):
    self.base = dense(rngs, D, D)
    self.down, self.up = dense(rngs, D, 2), dense(rngs, 2, D)

  def __call__(self, x, context):
    return {**x, "h": x["h"] + jnp.tanh(self.base(x["h"]) + self.up(self.down(x["h"])))}


class Join(nnx.Module):
  """A weighted average of all that came before."""

  def __init__(self, rngs):
    self.weights = nnx.Param(jnp.arange(1.0, 4, dtype=jnp.float64) / 6)

  def __call__(self, x):
    all_of_them = jnp.stack([*x["past"], x["h"]])
    return jnp.einsum("l,lbtd->btd", self.weights[...], all_of_them)


class Predict(nnx.Module):
  def __init__(self, rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float64))

  def __call__(self, h, batch):
    return classified(h @ self.table[...].T, batch["targets"])


def language(**options):
  """Embedding as a layer, skips to a join, tied ends, a base shared between depths."""
  tied = {"head/table": "layers/0/table", "layers/3/base": "layers/1/base"}
  layers = [Lookup, Mix, Mix, Adapted, Join]
  options = {"tied": tied} | options
  return LayerStack(embed=Tokens, layers=layers, head=Predict, **options)


def text(rows):
  rng = np.random.default_rng(1)
  return {name: rng.integers(0, V, (rows, T)) for name in ("tokens", "targets")}
