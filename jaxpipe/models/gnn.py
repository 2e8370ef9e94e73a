"""GNNPipe: a deep graph network whose layers are pipelined and whose graph is cut into chunks.

Layers lie on the stages; a microbatch is a chunk, that is some of the nodes. A layer sums over each
node's neighbours, and those in other chunks are not in the microbatch. In their place it reads
their *historical embeddings*: constants, namely the normed inputs that this layer had for these
nodes a step ago. So nothing is sent but chunks from stage to stage, V D numbers at each stage
boundary, where cutting the graph over the devices would send V D numbers for each layer.

    chunk        history of this layer [V, D]        table that the neighbours are looked up in
    rows 2, 3    a step old, no gradient
                   0 1 2 3 4 5                          0 1 2'3'4 5      ' current, with gradient
                   -----------      own rows written    -----------

With one chunk every row is current: exactly the full graph.

In GNNPipe a chunk that went through this layer earlier in the same step is current; here all other
chunks are a step old. That makes a step a function of the step before alone, the same under every
schedule, and no order of the chunks is better than another, so none need be shuffled.

The history is model state, and the step's new state is the mean over what its K microbatches
return. Each chunk replaces its own rows, so it returns old + K (new - old) on its rows and old
elsewhere: the mean is new everywhere.

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
    nodes: V, number of nodes, including those that fill up the last chunk.
    features: F, number of features of a node.
    classes: number of classes that a node may have.
    layers: number of layers.
    width: D, width of a node's embedding.
    dropout: dropout rate of what a layer adds, in [0, 1).
    dtype: dtype of parameters, history and arithmetic.
  """

  nodes: int
  features: int
  classes: int
  layers: int = 8
  width: int = 64
  dropout: float = 0.5
  dtype: Any = jnp.float32

  def linear(self, wide: int, narrow: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a dense layer from `wide` to `narrow` elements, in the configuration's dtype."""
    return nnx.Linear(wide, narrow, dtype=self.dtype, param_dtype=self.dtype, rngs=rngs)

  def norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a norm over the D channels of a node."""
    return nnx.LayerNorm(self.width, dtype=self.dtype, param_dtype=self.dtype, rngs=rngs)


class History(nnx.BatchStat):
  """Model state of a layer: its normed input for every node a step ago, [V, D]."""


class Embed(nnx.Module):
  """A linear map and a ReLU: `batch["features"]` [B, F] -> h [B, D]."""

  def __init__(self, config: GnnConfig, rngs: nnx.Rngs):
    self.project = config.linear(config.features, config.width, rngs)

  def __call__(self, batch: Any) -> jax.Array:
    return nnx.relu(self.project(batch["features"]))


class Layer(nnx.Module):
  """Adds to each node a function of itself and of the weighted sum over its neighbours.

  Reads `node` int [B], the numbers of the chunk's nodes, `neighbours` int [B, G] and `strengths`
  float [B, G], the numbers and the weights of each node's neighbours, weight 0 for padding.
  """

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
    """Returns the weighted sum over each node's neighbours, and in training updates the history.

    Args:
      own_BD: normed embeddings of the chunk's nodes.
      context: gives the chunk's nodes, their neighbours, and whether it is training.

    Returns:
      [B, D].
    """
    past_VD, node_B = jax.lax.stop_gradient(self.history[...]), context.batch["node"]
    # Nodes of this chunk are current and have a gradient; all others are constants.
    table_VD = past_VD.at[node_B].set(own_BD)
    if context.training:
      # So that the mean over the chunks' histories is the new one (see the module's docstring).
      chunks = len(past_VD) // len(own_BD)
      change_BD = jax.lax.stop_gradient(own_BD) - past_VD[node_B]
      self.history[...] = past_VD.at[node_B].add(chunks * change_BD)
    near_BGD = table_VD[context.batch["neighbours"]]
    return jnp.einsum("BG,BGD->BD", context.batch["strengths"].astype(own_BD.dtype), near_BGD)


class Head(nnx.Module):
  """Cross-entropy (nats) of the nodes' classes, summed with weights; metrics `correct`.

  Reads `labels` int [B] and `weights` float [B], 0 for nodes that are not trained on.
  """

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
  """Returns the model as a stack, for batches whose microbatches are the chunks of one graph.

  `jaxpipe.data.experiments.graph.Graph.rows` makes such a batch.
  """
  layer = functools.partial(Layer, config)
  return LayerStack(
    embed=functools.partial(Embed, config),
    layers=[layer] * config.layers,
    head=functools.partial(Head, config),
  )
