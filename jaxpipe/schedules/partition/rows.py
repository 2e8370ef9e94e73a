"""Linear functions of the sums over stages, and the least value that each can take.

A row is a sum over stages, and a stage is a run of layers, so what the stages before or after a
boundary add to it at least follows by dynamic programming over (stage, layer).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

# Relative error of sums of floats: a row that exceeds its limit by no more keeps to it.
_ROUNDING = 1e-13

# S+1 numbers of layers: stage s begins at the s-th and ends before the one after it.
Boundaries = tuple[int, ...]
# By stage and first layer, the layers that it may end before.
Ends = Sequence[Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A linear function of the stages' sums: a bound on the objective, or a condition.

  Attributes:
    weights: S tuples: `weights[s]` has one factor for each resource of stage s.
    constant: its value where all sums are 0.
    limit: most that it may be, where it is a condition; None for a row of the objective.
  """

  weights: tuple[tuple[float, ...], ...]
  constant: float = 0
  limit: float | None = None


class Table:
  """One row in tables over (stage, layer), by which partial sums of it are differences.

  Attributes:
    constant: the row's constant.
    limit: the row's limit, with an allowance for rounding; None for a row of the objective.
    at: `at[s][x]` is what stage s would add if it were the first x layers.
    to_come: `to_come[s][x]` is the least that the stages s ... S-1 add from layer x on.
  """

  def __init__(self, row: Row, sums: Sequence[Sequence[float]]) -> None:
    self.constant = row.constant
    self.limit = None if row.limit is None else row.limit + _ROUNDING * abs(row.limit)
    L = len(sums[0]) - 1
    # A stage from layer y up to x adds `at[s][x] - at[s][y]`.
    self.at = [
      [sum(w * up_to[x] for w, up_to in zip(weights, sums, strict=True) if w) for x in range(L + 1)]
      for weights in row.weights
    ]
    self.to_come: list[list[float]] = []

  def look_ahead(self, ends: Ends) -> None:
    """Fills `to_come`, for stages that may end where `ends` says."""
    S, L = len(self.at), len(self.at[0]) - 1
    rest = [math.inf] * L + [0.0]
    self.to_come = [rest]
    for s in reversed(range(S)):
      at, after = self.at[s], [a + b for a, b in zip(self.at[s], rest, strict=True)]
      rest = [min([after[x] for x in ends[s][y]], default=math.inf) - at[y] for y in range(L + 1)]
      self.to_come.append(rest)
    self.to_come.reverse()

  def look_back(self, ends: Ends) -> list[list[float]]:
    """Returns, for all s and x, the least that the stages 0 ... s-1 add up to layer x."""
    L = len(self.at[0]) - 1
    done = [[self.constant] + [math.inf] * L]
    for s, at in enumerate(self.at):
      least = [math.inf] * (L + 1)
      for y, before in enumerate(done[s]):
        if before < math.inf:
          for x in ends[s][y]:
            least[x] = min(least[x], before - at[y] + at[x])
      done.append(least)
    return done

  def until(self, boundaries: Boundaries) -> float:
    """Returns the constant and what the stages that the boundaries enclose add to it."""
    stages = zip(self.at, itertools.pairwise(boundaries), strict=False)
    return self.constant + sum(at[x] - at[y] for at, (y, x) in stages)

  def too_large(self, value: float, cutoff: float) -> bool:
    """Whether a row of at least `value` rules a partition out: no better, or over the limit."""
    return value >= cutoff if self.limit is None else value > self.limit
