"""Translations by a trained model, on one device.

The source is encoded once, and what is said so far is decoded anew for every token.

Dims: B rows, S and T longest source and target, N = B times the beams.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from jaxpipe.data.experiments.pairs import BEGIN, END, PAD, Pairs, PairVocabulary, in_batches
from jaxpipe.models.translation import Streams
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.tasks.beam import beam_search

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Translator:
  """Translates with a stack of `jaxpipe.models.translation`.

  Attributes:
    stack: the model, as many encoder as decoder layers.
    vocabulary: its ids.
    batch_size: texts at once.
    beams: of the search; 1 takes the likeliest token each time.
  """

  stack: LayerStack
  vocabulary: PairVocabulary
  batch_size: int = 64
  beams: int = 1

  def __call__(self, params: Tree, pairs: Pairs, which: npt.NDArray[np.int64]) -> list[str]:
    """Translates the sources of some pairs, in their order.

    Args:
      params: canonical, whole on one device.
      pairs: only their sources are read; a translation has at most as many tokens as theirs.
      which: numbers of the pairs, such as `pairs.of(language)`.
    """
    said = []
    for piece in in_batches(which, self.batch_size):
      ids = np.asarray(self.search(params, pairs.batch(piece)["source"]))
      said += [self.vocabulary.text(row) for row in ids[piece >= 0]]
    return said

  @functools.cached_property
  def search(self) -> Any:
    """`(params, source [B, S]) -> ids [B, S]`, compiled once for every shape."""
    return jax.jit(self._search)

  def _search(self, params: Tree, source_BS: jax.Array) -> jax.Array:
    embed, *layers, head = modules(self.stack, params)
    half, (B, S) = len(layers) // 2, source_BS.shape

    # The decoder's stream passes by the encoder: any will do.
    x = embed({"source": source_BS, "tokens": source_BS})
    encoded_BSD = pass_through(layers[:half], x, {"source": source_BS}).encoded
    encoded_NSD = jnp.repeat(encoded_BSD, self.beams, axis=0)
    source_NS = jnp.repeat(source_BS, self.beams, axis=0)

    def follow(tokens_NT: jax.Array, t: jax.Array) -> jax.Array:
      x = Streams(encoded_NSD, embed.look_up(tokens_NT))
      decoded = pass_through(layers[half:], x, {"source": source_NS})
      here_N1D = jax.lax.dynamic_slice_in_dim(decoded.decoded, t, 1, axis=1)
      logits_NV: jax.Array = head.logits(Streams(encoded_NSD, here_N1D))[:, 0]
      return logits_NV

    return beam_search(follow, B, S, begin=BEGIN, end=END, pad=PAD, beams=self.beams)


def pass_through(layers: Sequence[Any], x: Tree, batch: Tree) -> Tree:
  """Some layers, one after the other, without dropout."""
  context = Context(batch, False, None, jnp.arange(len(batch["source"])))
  for layer in layers:
    x = layer(x, context)
  return x


def modules(stack: LayerStack, params: Tree) -> list[Any]:
  """The modules of a stack, in order, holding canonical parameters."""
  trees = stack.network.split(params)
  return [
    nnx.merge(spec.graph, stack.network.params_of(name, trees))
    for name, spec in stack.network.specs.items()
  ]
