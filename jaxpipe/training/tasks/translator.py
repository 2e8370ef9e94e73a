"""Translates texts with a trained encoder-decoder stack, on one device, without a pipeline.

A batch of sources goes through the embedding and the encoder layers once. The decoder layers then
run once for every token of the answer, over the tokens that were chosen before, and the search
(`beam.py`) chooses the next one:

    source [B, S] -> embed, encoder layers -> encoded [B, S, D], repeated for every beam [N, S, D]
    tokens [N, T] -> look up, decoder layers on (encoded, tokens) -> logits [N, V] of position t

Dims: B rows, S and T longest source and target, N = B times the beams, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxpipe.data.experiments.pairs import BEGIN, END, PAD, Pairs, PairVocabulary, in_batches
from jaxpipe.models.translation import Streams
from jaxpipe.stack.forward import modules, run_layers
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.tasks.beam import beam_search

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Translator:
  """Translates with a stack of `jaxpipe.models.translation`.

  Attributes:
    stack: the model; its first half of layers encodes, the second decodes. It has no state.
    vocabulary: says which ids stand for which text.
    batch_size: texts that are translated at once, B.
    beams: answers that the search follows for each text; with 1 it takes the likeliest token each
      time.
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
    for numbers in in_batches(which, self.batch_size):
      ids = np.asarray(self.search(params, pairs.batch(numbers)["source"]))
      # -1 stands for the rows that fill up the last batch.
      said += [self.vocabulary.text(row) for row in ids[numbers >= 0]]
    return said

  @functools.cached_property
  def search(self) -> Any:
    """`(params, source [B, S]) -> ids [B, S]`, compiled once for every shape."""
    return jax.jit(self._search)

  def _search(self, params: Tree, source_BS: jax.Array) -> jax.Array:
    embed, *layers, head = modules(self.stack, params, {})
    half, (B, S) = len(layers) // 2, source_BS.shape

    # Encoder layers leave the decoder's half of the stream alone, so that any tokens will do.
    x = embed({"source": source_BS, "tokens": source_BS})
    encoded_BSD = run_layers(layers[:half], x, {"source": source_BS}).encoded
    encoded_NSD = jnp.repeat(encoded_BSD, self.beams, axis=0)
    source_NS = jnp.repeat(source_BS, self.beams, axis=0)

    def follow(tokens_NT: jax.Array, t: jax.Array) -> jax.Array:
      """Logits [N, V] of what follows position t, as `beam_search` asks for them."""
      x = Streams(encoded_NSD, embed.look_up(tokens_NT))
      decoded = run_layers(layers[half:], x, {"source": source_NS})
      # The head multiplies by the whole vocabulary: at one position, not at all T.
      here_N1D = jax.lax.dynamic_slice_in_dim(decoded.decoded, t, 1, axis=1)
      logits_NV: jax.Array = head.logits(Streams(encoded_NSD, here_N1D))[:, 0]
      return logits_NV

    return beam_search(follow, B, S, begin=BEGIN, end=END, pad=PAD, beams=self.beams)
