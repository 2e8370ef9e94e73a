"""GNNPipe: one chunk is the full graph, and chunks with history become it as the steps go by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe.data.experiments.graph import Graph
from jaxpipe.models.gnn import Embed, GnnConfig, Head, Layer
from jaxpipe.stack.context import Context

NODES, LAYERS, FEATURES, WIDTH = 8, 4, 5, 6
rng = np.random.default_rng(0)
GRAPH = Graph(
  features=rng.standard_normal((7, FEATURES)),
  labels=rng.integers(3, size=7),
  edges=np.array([[0, 1], [0, 4], [1, 2], [1, 6], [2, 3], [3, 5], [4, 5], [5, 6]]),
)


def config(**changes):
  shape = dict(nodes=NODES, features=FEATURES, classes=3, layers=LAYERS, width=WIDTH)
  return GnnConfig(**{**shape, "dropout": 0.0, "dtype": jnp.float64, **changes})


def batch():
  """All seven nodes and one that fills up, exact weights of the adjacency in float64."""
  rows = GRAPH.rows(NODES, np.array([1, 0, 1, 1, 0, 1, 1.0]))
  strengths = np.take_along_axis(GRAPH.adjacency(), rows["neighbours"][:7], axis=1)
  features = np.r_[GRAPH.features, np.zeros((1, FEATURES))]
  return {**rows, "features": features, "strengths": np.r_[strengths, np.zeros_like(strengths[:1])]}


def modules(settings):
  rngs = nnx.Rngs(0)
  layers = nnx.List([Layer(settings, rngs) for _ in range(LAYERS)])
  return nnx.split(nnx.List([Embed(settings, rngs), layers, Head(settings, rngs)]), nnx.Param, ...)


@functools.partial(jax.jit, static_argnums=(0, 4))
def chunked(graph, params, state, batch, chunks):
  """Mean loss over the chunks, and the mean of the states that they return."""
  rows, losses, states = NODES // chunks, [], []
  for k in range(chunks):
    part = {name: leaf[k * rows : (k + 1) * rows] for name, leaf in batch.items()}
    embed, layers, head = model = nnx.merge(graph, params, state, copy=True)
    h = embed(part)
    for layer in layers:
      h = layer(h, Context(part, True, None, jnp.arange(rows)))
    losses.append(head(h, part)[0])
    states.append(nnx.split(model, nnx.Param, ...)[2])
  return sum(losses), jax.tree.map(lambda *leaves: sum(leaves) / chunks, *states)


@functools.partial(jax.jit, static_argnums=0)
def full_graph(graph, params, state, batch):
  """The loss of a plain full-graph network: a dense adjacency matrix, no neighbours, no history."""
  matrix = np.pad(GRAPH.adjacency(), (0, 1))
  embed, layers, head = nnx.merge(graph, params, state, copy=True)
  h = embed(batch)
  for layer in layers:
    own = layer.norm(h)
    h = h + nnx.relu(layer.mix(jnp.concatenate([own, matrix @ own], axis=1)))
  return head(h, batch)[0]


def test_one_chunk_is_the_full_graph(float64):
  (graph, params, state), data = modules(config()), batch()
  plain = jax.grad(lambda p: full_graph(graph, p, state, data))(params)
  piped = jax.grad(lambda p: chunked(graph, p, state, data, 1)[0])(params)
  for want, got in zip(jax.tree.leaves(plain), jax.tree.leaves(piped), strict=True):
    assert jnp.abs(want - got).max() <= 1e-12 * max(1, jnp.abs(want).max())


def test_chunks_become_the_full_graph_after_as_many_steps_as_layers(float64):
  (graph, params, state), data = modules(config()), batch()
  want, gaps = full_graph(graph, params, state, data), []
  for _ in range(LAYERS + 1):
    loss, state = chunked(graph, params, state, data, 4)
    gaps.append(abs(float(loss - want)))
  assert gaps[-1] <= 1e-12 < min(gaps[:-1])


def test_every_chunk_replaces_its_own_rows(float64):
  (graph, params, state), data = modules(config()), batch()
  _, after = chunked(graph, params, state, data, 2)
  first = nnx.merge(graph, params, after, copy=True)[1][0]
  embed, layers, _ = nnx.merge(graph, params, state, copy=True)
  np.testing.assert_allclose(first.history[...], layers[0].norm(embed(data)), atol=1e-14)


def test_no_gradient_goes_through_history(float64):
  (graph, params, state), data = modules(config()), batch()
  slope = jax.grad(lambda s: chunked(graph, params, s, data, 2)[0])(state)
  assert all(not leaf.any() for leaf in jax.tree.leaves(slope))


def test_evaluation_leaves_history_alone():
  layer, data = Layer(config(dtype=jnp.float32), nnx.Rngs(0)), batch()
  layer(jnp.ones((NODES, WIDTH)), Context(data, False, None, jnp.arange(NODES)))
  assert not layer.history[...].any()
