"""A graph for node classification as the rows of a batch, which a pipeline may divide anywhere.

Every node is a row: its features, its label, and its neighbours as a padded list of numbers with
the weights of the normalised adjacency matrix of Kipf and Welling (arXiv 1609.02907),

    P = D^-1/2 (A + I) D^-1/2    with D the degrees of A + I

so that row i of P is `neighbours[i]`, `strengths[i]`, and any stretch of rows is a microbatch.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpipe.data.errors import DataError

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
  """A graph whose nodes have features and a class.

  Attributes:
    features: float32 [n, F], of every node.
    labels: int32 [n], the class of every node.
    edges: int [e, 2], pairs of nodes that are neighbours, each pair once, no node with itself.
  """

  features: Array
  labels: Array
  edges: Array

  def adjacency(self) -> Array:
    """Returns the normalised adjacency matrix P, dense: float64 [n, n]."""
    nodes = len(self.labels)
    matrix = np.eye(nodes)
    matrix[self.edges[:, 0], self.edges[:, 1]] = matrix[self.edges[:, 1], self.edges[:, 0]] = 1
    scale = matrix.sum(axis=1) ** -0.5
    normalised: Array = scale[:, None] * matrix * scale
    return normalised

  def rows(self, count: int, weights: Array) -> dict[str, Array]:
    """Returns all nodes as one batch, filled up with nodes that have no neighbours and weight 0.

    Args:
      count: B, rows of the batch, at least n.
      weights: float [n], how much each node counts in the loss.

    Returns:
      node int32 [B] (0 ... B-1), features float32 [B, F], labels int32 [B], weights float32 [B],
      neighbours int32 [B, G] and strengths float32 [B, G], G the largest degree plus 1.

    Raises:
      DataError: fewer rows than nodes.
    """
    nodes = len(self.labels)
    if count < nodes:
      raise DataError(f"{count} rows cannot hold a graph of {nodes} nodes; use {nodes} or more")
    matrix = self.adjacency()
    most = int((matrix > 0).sum(axis=1).max())
    neighbours = np.argsort(matrix == 0, axis=1, kind="stable")[:, :most]
    own = {
      "node": np.arange(count, dtype=np.int32),
      "features": self.features.astype(np.float32),
      "labels": self.labels.astype(np.int32),
      "weights": weights.astype(np.float32),
      "neighbours": neighbours.astype(np.int32),
      "strengths": np.take_along_axis(matrix, neighbours, axis=1).astype(np.float32),
    }
    return {
      name: np.concatenate([leaf, np.zeros((count - len(leaf), *leaf.shape[1:]), leaf.dtype)])
      for name, leaf in own.items()
    }

  def propagate_labels(self, known: Array, keep: float = 0.9, rounds: int = 50) -> Array:
    """Predicts labels by spreading known ones along the edges, a method without training.

    Args:
      known: bool [n], the nodes whose labels may be looked at.
      keep: share of what comes from neighbours, against the node's own label.
      rounds: iterations.

    Returns:
      int [n], the label of every node.

    References:
      Zhou et al., Learning with local and global consistency, NIPS 2003.
    """
    start = np.eye(int(self.labels.max()) + 1)[self.labels] * known[:, None]
    matrix, scores = self.adjacency(), start
    for _ in range(rounds):
      scores = keep * matrix @ scores + (1 - keep) * start
    spread: Array = scores.argmax(axis=1)
    return spread


def spelling(words: Sequence[str], width: int) -> Array:
  """Makes features of words from their spelling: hashed counts of 3 and of 4 letters in a row.

  Args:
    words: n of them.
    width: F, number of buckets.

  Returns:
    float32 [n, F], rows of unit length.
  """
  counts = np.zeros((len(words), width), np.float32)
  for row, word in enumerate(words):
    marked = f"^{word}$"
    for length in (3, 4):
      for start in range(len(marked) - length + 1):
        counts[row, zlib.crc32(marked[start : start + length].encode()) % width] += 1
  norms: Array = np.linalg.norm(counts, axis=1, keepdims=True)
  return counts / np.maximum(norms, 1e-6)


def split(nodes: int, seed: int, train: float, held_out: float) -> tuple[Array, Array]:
  """Draws the nodes to train on and those to measure on.

  Args:
    nodes: n.
    seed: decides the draw.
    train, held_out: shares of the nodes, at most 1 together.

  Returns:
    Two masks, bool [n], that have no node in common.
  """
  order = np.random.default_rng(seed).permutation(nodes)
  first, last = np.zeros(nodes, bool), np.zeros(nodes, bool)
  first[order[: round(train * nodes)]] = True
  last[order[nodes - round(held_out * nodes) :]] = True
  return first, last
