"""The baseline of the speech experiment."""

import numpy as np

from experiments.speech import best_constant


def test_the_best_constant_answer_is_the_commonest_digit():
  labels = np.array([[3, 0, 0, 0], [3, 0, 0, 0], [3, 5, 0, 0], [7, 0, 0, 0]])
  # "3" is right twice, lacks the 5, and is wrong for the 7: two errors in five characters.
  assert abs(best_constant(labels) - 2 / 5) < 1e-6
