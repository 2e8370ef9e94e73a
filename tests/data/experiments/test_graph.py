"""Graphs as rows, labels spread along edges, and the thesaurus that ships."""

import pathlib

import numpy as np
import pytest

from jaxpipe.data.errors import DataError
from jaxpipe.data.experiments.graph import Graph, spelling, split
from jaxpipe.data.experiments.roget import CLASSES, load_roget

PATH = Graph(
  features=np.eye(4), labels=np.array([0, 0, 1, 1]), edges=np.array([[0, 1], [1, 2], [2, 3]])
)
ROGET = pathlib.Path(__file__).parents[3] / "data" / "roget" / "roget_dat.txt.gz"


def test_rows_are_those_of_the_normalised_adjacency():
  rows = PATH.rows(6, np.ones(4))
  dense = np.zeros((6, 6))
  for i, (near, strength) in enumerate(zip(rows["neighbours"], rows["strengths"], strict=True)):
    np.add.at(dense[i], near, strength)
  want = np.diag([1 / 2, 1 / 3, 1 / 3, 1 / 2])
  for one, two, degrees in ((0, 1, 6), (1, 2, 9), (2, 3, 6)):
    want[one, two] = want[two, one] = degrees**-0.5
  np.testing.assert_allclose(dense, np.pad(want, (0, 2)), rtol=1e-6)
  np.testing.assert_array_equal(rows["weights"], [1, 1, 1, 1, 0, 0])


def test_too_few_rows():
  with pytest.raises(DataError, match="3 rows cannot hold a graph of 4 nodes; use 4 or more"):
    PATH.rows(3, np.ones(4))


def test_labels_go_to_the_nearer_end():
  spread = PATH.propagate_labels(np.array([True, False, False, True]))
  np.testing.assert_array_equal(spread, PATH.labels)


def test_spelling_is_alike_where_words_are():
  love, lover, hate = spelling(["love", "lover", "hate"], 64)
  assert love @ lover > 0.4 > love @ hate
  np.testing.assert_allclose(love @ love, 1, rtol=1e-6)


def test_halves_are_disjoint_and_drawn_by_the_seed():
  train, held_out = split(100, seed=0, train=0.5, held_out=0.3)
  assert (train.sum(), held_out.sum()) == (50, 30) and not (train & held_out).any()
  assert (split(100, seed=1, train=0.5, held_out=0.3)[0] != train).any()


def test_the_thesaurus_that_ships():
  graph = load_roget(ROGET)
  assert graph.edges.shape == (3648, 2)
  np.testing.assert_array_equal(np.bincount(graph.labels), [185, 137, 136, 153, 225, 186])
  assert len(CLASSES) == 6
  one, two = graph.labels[graph.edges.T]
  assert 0.6 < (one == two).mean() < 0.65  # chance is 0.17
