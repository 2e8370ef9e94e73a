"""Linear functions of what stages sum up to, and the least that each can come to.

A row is a sum over stages, and a stage is a run of layers, so what the stages before or after a
boundary add to it at least follows by dynamic programming over (stage, layer).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

# What sums of floats may be off by, relative: what just fits a limit fits it.
_ROUNDING = 1e-13

# S+1 layers: stage s begins at the s-th and ends before the one after it.
Boundaries = tuple[int, ...]
# By stage and first layer, the layers that it may end before.
Ends = Sequence[Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A linear function of what the stages sum up to.

  Attributes:
    weights: `weights[s]` has one factor for each resource of stage s.
    constant: what it is without any.
    limit: most that it may be; None for a row of the objective.
  """

  weights: tuple[tuple[float, ...], ...]
  constant: float = 0
  limit: float | None = None


class Table:
  """One row, tabulated: its part up to each layer, and the least of what is to come."""

  def __init__(self, row: Row, sums: Sequence[Sequence[float]]) -> None:
    self.constant = row.constant
    self.limit = None if row.limit is None else row.limit + _ROUNDING * abs(row.limit)
    L = len(sums[0]) - 1
    # `at[s][x]`: stage s from the first layer up to x; a stage is a difference of two.
    self.at = [
      [sum(w * up_to[x] for w, up_to in zip(weights, sums, strict=True) if w) for x in range(L + 1)]
      for weights in row.weights
    ]
    self.to_come: list[list[float]] = []

  def look_ahead(self, ends: Ends) -> None:
    """Least of the stages s ... S-1 from layer x, for all s and x."""
    S, L = len(self.at), len(self.at[0]) - 1
    rest = [math.inf] * L + [0.0]
    self.to_come = [rest]
    for s in reversed(range(S)):
      at, after = self.at[s], [a + b for a, b in zip(self.at[s], rest, strict=True)]
      rest = [min([after[x] for x in ends[s][y]], default=math.inf) - at[y] for y in range(L + 1)]
      self.to_come.append(rest)
    self.to_come.reverse()

  def look_back(self, ends: Ends) -> list[list[float]]:
    """Least of the stages 0 ... s-1 up to layer x, for all s and x."""
    L = len(self.at[0]) - 1
    done = [[self.constant] + [math.inf] * L]
    for s, at in enumerate(self.at):
      here = [math.inf] * (L + 1)
      for y, before in enumerate(done[s]):
        if before < math.inf:
          for x in ends[s][y]:
            here[x] = min(here[x], before - at[y] + at[x])
      done.append(here)
    return done

  def until(self, boundaries: Boundaries) -> float:
    """The constant and the stages that the boundaries enclose."""
    pieces = zip(self.at, itertools.pairwise(boundaries), strict=False)
    return self.constant + sum(at[x] - at[y] for at, (y, x) in pieces)

  def too_large(self, value: float, cutoff: float) -> bool:
    """Whether a partition of which this row is at least `value` is out."""
    return value >= cutoff if self.limit is None else value > self.limit
