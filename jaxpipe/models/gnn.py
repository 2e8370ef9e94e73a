"""A deep graph network whose layers are pipelined and whose graph is cut into chunks: GNNPipe.

Layers lie on the stages; a microbatch is a chunk, a stretch of the nodes. A layer needs what its
neighbours hold, and those in other chunks are not there: it reads their *historical embeddings*,
what this layer saw of them a step ago, as constants. So nothing is sent but chunks from stage to
stage, V D numbers a stage boundary, where cutting the graph over the devices sends V D a layer.

    chunk        history of this layer [V, D]        table that the neighbours are looked up in
    rows 2, 3    a step old, no gradient
                   0 1 2 3 4 5                          0 1 2'3'4 5      ' current, with gradient
                   -----------      own rows written    -----------

With one chunk every row is current: exactly the full graph.

GNNPipe reads a chunk that went through this layer earlier in the same step as it is now; here all
other chunks are a step old. That makes a step a function of the step before alone, the same under
every schedule, and no order of the chunks is better than another, so none need be shuffled.

Each chunk replaces its own rows and returns a whole history, of which the step takes the mean over
the K chunks. So a chunk returns old + K (new - old) on its rows and old elsewhere: the mean is new
everywhere.

Dims: B rows (nodes of a chunk), V nodes of the whole graph, K = V / B chunks, G neighbours at most,
F features, D width.

References:
  GNNPipe: Chen et al., arXiv 2308.10087. Historical embeddings: Chen et al., arXiv 1710.10568; Fey
  et al., GNNAutoScale, arXiv 2106.05609. Layers: GraphSAGE, Hamilton et al., arXiv 1706.02216,
  with the normalised residuals of DeeperGCN, Li et al., arXiv 2006.07739, which let them be many.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class GnnConfig:
  """Shape and arithmetic of the model.

  Attributes:
    nodes: V, with those that fill the last chunk up.
    features: F.
    classes: number of classes.
    layers: number of layers.
    width: D.
    dropout: rate, of what a layer adds.
    dtype: of parameters, history and arithmetic.
  """

  nodes: int
  features: int
  classes: int
  layers: int = 8
  width: int = 64
  dropout: float = 0.5
  dtype: Any = jnp.float32

  def linear(self, wide: int, narrow: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer."""
    return nnx.Linear(wide, narrow, dtype=self.dtype, param_dtype=self.dtype, rngs=rngs)

  def norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A norm over the channels of a node."""
    return nnx.LayerNorm(self.width, dtype=self.dtype, param_dtype=self.dtype, rngs=rngs)


class History(nnx.BatchStat):
  """What a layer saw of every node a step ago, [V, D]."""


class Embed(nnx.Module):
  """`batch["features"]` [B, F] -> h [B, D]."""

  def __init__(self, config: GnnConfig, rngs: nnx.Rngs):
    self.project = config.linear(config.features, config.width, rngs)

  def __call__(self, batch: Any) -> jax.Array:
    return nnx.relu(self.project(batch["features"]))


class Layer(nnx.Module):
  """Adds to each node a function of itself and of the weighted sum over its neighbours."""

  def __init__(self, config: GnnConfig, rngs: nnx.Rngs):
    self.rate = config.dropout
    self.norm = config.norm(rngs)
    self.mix = config.linear(2 * config.width, config.width, rngs)
    self.history = History(jnp.zeros((config.nodes, config.width), config.dtype))

  def __call__(self, h_BD: jax.Array, context: Context) -> jax.Array:
    own_BD = self.norm(h_BD)
    both_B2D = jnp.concatenate([own_BD, self.gather(own_BD, context)], axis=-1)
    return h_BD + context.dropout(nnx.relu(self.mix(both_B2D)), self.rate)

  def gather(self, own_BD: jax.Array, context: Context) -> jax.Array:
    """The weighted sum over every node's neighbours, [B, D]; notes `own_BD` for the next step."""
    past_VD, node_B = jax.lax.stop_gradient(self.history[...]), context.batch["node"]
    table_VD = past_VD.at[node_B].set(own_BD)
    if context.training:
      chunks = len(past_VD) // len(own_BD)
      change_BD = jax.lax.stop_gradient(own_BD) - past_VD[node_B]
      self.history[...] = past_VD.at[node_B].add(chunks * change_BD)
    near_BGD = table_VD[context.batch["neighbours"]]
    return jnp.einsum("BG,BGD->BD", context.batch["strengths"].astype(own_BD.dtype), near_BGD)


class Head(nnx.Module):
  """Cross-entropy of the nodes' classes, weighted by `batch["weights"]`."""

  def __init__(self, config: GnnConfig, rngs: nnx.Rngs):
    self.norm = config.norm(rngs)
    self.out = config.linear(config.width, config.classes, rngs)

  def __call__(self, h_BD: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, Any]:
    logits = self.out(self.norm(h_BD))
    weights = batch["weights"].astype(logits.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    correct = (logits.argmax(axis=-1) == batch["labels"]) * weights
    return jnp.sum(losses * weights), jnp.sum(weights), {"correct": jnp.sum(correct)}


def gnn(config: GnnConfig) -> LayerStack:
  """The stack; `Graph.rows` of `jaxpipe.data` makes a batch, whose microbatches are its chunks."""
  layer = functools.partial(Layer, config)
  return LayerStack(
    embed=functools.partial(Embed, config),
    layers=[layer] * config.layers,
    head=functools.partial(Head, config),
  )
