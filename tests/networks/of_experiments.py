"""The experiments' nine networks, tiny and in float64, and batches of 8 rows for each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import lm

from jaxpipe.data.experiments.flow_batches import FlowBatches
from jaxpipe.data.experiments.graph import Graph
from jaxpipe.models.diffusion.dit import DitConfig, dit
from jaxpipe.models.diffusion.patch_codec import PatchCodec
from jaxpipe.models.gnn import GnnConfig, gnn
from jaxpipe.models.speech.deep_speech import DeepSpeechConfig, deep_speech
from jaxpipe.models.translation import TranslationConfig, translation
from jaxpipe.models.vision.amoebanet import Classifier, amoebanet
from jaxpipe.models.vision.amoebanet_cells import AmoebaNetConfig
from jaxpipe.models.vision.gmlp import GmlpConfig, gmlp
from jaxpipe.models.vision.pictures import convolve
from jaxpipe.models.vision.segmentation import SegmentationConfig, segmentation
from jaxpipe.models.vision.vit import VitConfig, vit
from jaxpipe.stack.stack import LayerStack

ROWS = 8
FLOAT64: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}
CONVOLUTIONS = dict(convolution=convolve, momentum=0.9, **FLOAT64)
PATCHES = dict(image=(4, 4, 2), classes=3, width=8, layers=4, dropout=0.2, **FLOAT64)


def make_amoebanet() -> LayerStack:
  """The stem, a normal cell and a reduction cell; all of them take half a minute to compile."""
  config = AmoebaNetConfig(
    layers=3, filters=4, classes=3, image_channels=1, stem_cells=0, **CONVOLUTIONS
  )
  whole = amoebanet(config)
  return LayerStack(
    embed=whole.embed,
    layers=whole.layers[:3],
    head=lambda rngs: Classifier(config, 3 * 8, rngs),
  )


def make_translation() -> LayerStack:
  shape = dict(vocabulary_size=11, layers=2, width=8, hidden=12, heads=2, dropout=0.2)
  return translation(TranslationConfig(**shape, **FLOAT64))


def make_dit() -> LayerStack:
  config = DitConfig(classes=3, tokens=4, width=8, heads=2, layers=4, dtype=jnp.float64)
  return dit(config, PatchCodec.fit(drawings(), patch=2, channels=2))


def make_gnn() -> LayerStack:
  shape = dict(nodes=ROWS, features=5, classes=3, layers=4, width=6)
  return gnn(GnnConfig(**shape, dropout=0.3, dtype=jnp.float64))


def make_speech() -> LayerStack:
  shape = dict(bands=8, symbols=4, channels=2, width=3, dropout=0.2)
  return deep_speech(DeepSpeechConfig(**shape, dtype=jnp.float64))


def drawings() -> np.ndarray:
  return np.random.default_rng(0).random((12, 4, 4)).astype(np.float32)


def pictures(channels: int, of_pixels: bool = False) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  label = rng.integers(0, 3, (ROWS, 4, 4) if of_pixels else ROWS, np.int32)
  weights = np.ones(ROWS)
  weights[-1] = 0
  return {"image": rng.normal(size=(ROWS, 4, 4, channels)), "label": label, "weights": weights}


def sentences() -> dict[str, np.ndarray]:
  """Sources and targets of unlike lengths, so that microbatches weigh unlike."""
  rng = np.random.default_rng(0)
  source, tokens, targets = (rng.integers(1, 11, (ROWS, n), np.int32) for n in (5, 4, 4))
  weights = (np.arange(4) < rng.integers(1, 5, (ROWS, 1))).astype(np.float64)
  source[np.arange(5) >= rng.integers(2, 6, (ROWS, 1))] = 0
  return {"source": source, "tokens": tokens, "targets": targets, "weights": weights}


def noised() -> dict[str, np.ndarray]:
  labels = np.arange(12) % 3
  all_of_them = FlowBatches(
    images=drawings(), labels=labels, batch_size=ROWS, latent=(4, 2), no_class=3
  )
  return {name: widened(leaf) for name, leaf in all_of_them[0].items()}


def nodes() -> dict[str, np.ndarray]:
  """Seven nodes and one that fills up, exact weights of the adjacency in float64."""
  rng = np.random.default_rng(0)
  graph = Graph(
    features=rng.standard_normal((7, 5)),
    labels=rng.integers(3, size=7),
    edges=np.array([[0, 1], [0, 4], [1, 2], [1, 6], [2, 3], [3, 5], [4, 5], [5, 6]]),
  )
  rows = graph.rows(ROWS, np.array([1, 0, 1, 1, 0, 1, 1.0]))
  strengths = np.take_along_axis(graph.adjacency(), rows["neighbours"][:7], axis=1)
  features = np.r_[graph.features, np.zeros((1, 5))]
  strengths = np.r_[strengths, np.zeros_like(strengths[:1])]
  return {name: widened(leaf) for name, leaf in rows.items()} | {
    "features": features,
    "strengths": strengths,
  }


def utterances() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "mels": rng.standard_normal((ROWS, 16, 8)),
    "frames": np.array([16, 12, 16, 9] * 2, np.int32),
    "labels": np.array([[1, 2], [3, 0], [2, 2], [1, 0]] * 2, np.int32),
    "weights": np.array([1, 1, 0, 1] * 2, np.float64),
  }


def widened(leaf: np.ndarray) -> np.ndarray:
  return leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf


NETWORKS: dict[str, tuple[Callable[[], LayerStack], Callable[[], dict[str, np.ndarray]]]] = {
  "lm": (lm.stack, lambda: lm.batch(ROWS)),
  "amoebanet": (make_amoebanet, lambda: pictures(1)),
  "translation": (make_translation, sentences),
  "vit": (
    lambda: vit(VitConfig(**PATCHES, heads=2, mlp_width=12, attention=lm.attention)),
    lambda: pictures(2),
  ),
  "gmlp": (lambda: gmlp(GmlpConfig(**PATCHES, hidden=12)), lambda: pictures(2)),
  "segmentation": (
    lambda: segmentation(SegmentationConfig(classes=3, widths=(2, 3), **CONVOLUTIONS)),
    lambda: pictures(1, of_pixels=True),
  ),
  "dit": (make_dit, noised),
  "gnn": (make_gnn, nodes),
  "speech": (make_speech, utterances),
}


def uneven(stack: LayerStack, stages: int) -> LayerStack:
  """The same with layers in uneven numbers, no layers in the first stage, or holes."""
  rest = stack.depth - 2
  sizes = {2: (1, rest + 1), 4: (0, 1, 1, rest), 8: (1, 0, 1, 0, 0, rest, 0, 0)}
  return dataclasses.replace(stack, partition=sizes[stages])


def shaken(params: Any, scale: float = 0.3) -> Any:
  """Parameters away from where they start: gates that start at zero hide what is behind them."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  moved = [
    p + scale * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(structure, moved)
