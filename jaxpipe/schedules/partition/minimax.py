"""Finds the partition whose largest linear function is least, by best-first branch and bound.

The objective is given as *rows*, linear functions of the stages' sums, and as `judge`, which
returns a whole partition's value and the row that attains it. The value must be the largest of all
rows there are, most of which nobody has written down; each partition that is looked at adds the
one that decided it (cutting planes: Kelley, 1960). A row with a limit is a condition instead.

A single row splits into stages, so dynamic programming has the least that it can come to:

    stages chosen: (0, 4, 7)                 stages to come: any way from layer 7 to layer L
    row k of the chosen  +  row k of stage 2 ...  +  least of row k over the rest of the stages

  [1] the open beginning with the lowest bound; when it reaches the best value, that is proven
  [2] its bound may have grown since it was pushed, by rows that were added
  [3] a whole partition: its value, and the row that says so
  [4] its bound for every next boundary is the largest row's

Stages that no partition below the best value contains are struck out (`_strike`): through each
(stage, first layer, last layer) some row's least total is too large. That is what makes bounds
sharp: of the stages of 1F1B it leaves those below a common time.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Container, Iterator, Sequence

from jaxpipe.schedules.partition.rows import Boundaries, Row, Table

# Relative: below this, two values are the same.
_SAME = 1e-11
# Rows are added until this many; more would slow every bound for little.
_ROWS = 64
# Striking costs a pass over all rows and stages, so it waits for that many new rows.
_STRIKE_EVERY = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
  """The result of a search.

  Attributes:
    boundaries: S+1 boundaries of the best partition found; None if none was found that keeps to the
      limits.
    value: value of these; infinite without.
    lower_bound: a number that the value of no partition can go below.
    looked: number of partitions and beginnings of them that were looked at.
  """

  boundaries: Boundaries | None
  value: float
  lower_bound: float
  looked: int

  @property
  def proven(self) -> bool:
    """Whether no better partition can exist."""
    return self.value - self.lower_bound <= _SAME * abs(self.value) or math.isinf(self.lower_bound)


# The value of a partition, and a row that has it there (None if no row can be given).
Judge = Callable[[Boundaries], tuple[float, Row | None]]


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class _Open:
  """An open node of the search: the first boundaries of partitions that may be better.

  Nodes are ordered as the heap wants them: by bound, and of equal bounds the longest first.

  Attributes:
    bound: a number that the value of no partition with these first boundaries can go below.
    depth: minus the number of its stages.
    boundaries: the first layers of its stages, and the first layer after them.
    values: the values of the rows without the last stage, a list that all alternatives for that
      stage share.
  """

  bound: float
  depth: int
  boundaries: Boundaries
  values: list[float]


class Minimax:
  """The branch and bound, with the rows and stages that it knows.

  Attributes:
    stages: number of stages, S.
    layers: number of layers, L.
    sums: by resource, its sum over the first 0, 1, ... L layers.
    judge: the value of a whole partition, and a row that has it there.
    price: what asking `judge` counts as, in nodes.
    effort: most nodes that may be looked at.
    best: value and boundaries of the best partition so far; None before the first.
    looked: nodes looked at so far.
    ends: `ends[s][y]` are the layers that stage s may end before if it begins at layer y; struck
      out stages are removed.
    tables: the known rows, objective and conditions.
  """

  def __init__(
    self,
    *,
    sums: Sequence[Sequence[float]],
    stages: int,
    least: int,
    rows: Sequence[Row],
    judge: Judge,
    price: int = 1,
    effort: int,
    pinned: dict[int, int] | None = None,
    barred: Container[int] = (),
  ) -> None:
    """Lays the problem out.

    Args:
      sums: by resource, its sum over the first 0, 1, ... L layers.
      stages: number of stages, S.
      least: the fewest layers of a stage.
      rows: some rows of the objective to begin with, and all conditions.
      judge: returns the value of a whole partition, and a row that has it there or None.
      price: what asking `judge` counts as, in beginnings of partitions looked at.
      effort: most partitions and beginnings of them that may be looked at.
      pinned: stage -> the layer that it must begin at.
      barred: layers that no stage may begin at.
    """
    self.stages, self.layers, self.sums = stages, len(sums[0]) - 1, sums
    self.judge, self.price, self.effort = judge, price, effort
    self.best: tuple[float, Boundaries | None] = (math.inf, None)
    self.looked = 0
    pins = {0: 0, stages: self.layers, **(pinned or {})}
    L = self.layers

    def allowed(s: int, x: int) -> bool:
      """Whether stage s may begin at layer x."""
      return pins.get(s, x) == x and x not in barred

    self.ends = [
      [
        [x for x in range(y + least, L + 1) if allowed(s, y) and allowed(s + 1, x)]
        for y in range(L + 1)
      ]
      for s in range(stages)
    ]
    self.tables: list[Table] = []
    for row in rows:
      self._add(row)
    self._struck_at = (math.inf, 0)

  def offer(self, boundaries: Boundaries) -> float:
    """Looks at a whole partition, and keeps it if it is the best so far.

    Args:
      boundaries: S+1 layers.

    Returns:
      Its value; infinite if it breaks a condition.
    """
    if any(t.limit is not None and t.until(boundaries) > t.limit for t in self.tables):
      return math.inf
    self.looked += self.price
    value, row = self.judge(boundaries)
    if value < self.best[0]:
      self.best = (value, boundaries)
    known = row is None or value - self.largest_row(boundaries) <= _SAME * abs(value)
    if row is not None and not known and len(self.tables) < _ROWS:
      self._add(row)
    return value

  def descend(self, boundaries: Boundaries) -> None:
    """Moves boundaries by one layer, runs of them together, while that makes the value less.

    Moving the boundaries from a to b takes a layer from one stage and gives it to another.

    Args:
      boundaries: a whole partition to start from.
    """
    if not self._exists(boundaries):
      return
    value, before = self.offer(boundaries), math.inf
    while value < before:
      before = value
      for a, b in itertools.combinations(range(1, self.stages + 1), 2):
        for step in (-1, 1):
          run = (x + step for x in boundaries[a:b])
          moved = (*boundaries[:a], *run, *boundaries[b:])
          # What a known row rules out need not be judged.
          if self.looked < self.effort and self._exists(moved) and self.largest_row(moved) < value:
            found = self.offer(moved)
            if found < value:
              value, boundaries = found, moved

  def _exists(self, boundaries: Boundaries) -> bool:
    """Whether all stages of a partition are possible, and none has been struck out."""
    spans = itertools.pairwise(boundaries)
    return all(y >= 0 and x in stage[y] for stage, (y, x) in zip(self.ends, spans, strict=True))

  def largest_row(self, boundaries: Boundaries) -> float:
    """Returns the largest value of a known row of the objective, for a whole partition."""
    rows = (t.until(boundaries) for t in self.tables if t.limit is None)
    return max(rows, default=-math.inf)

  def run(self) -> Optimum:
    """Searches until the best partition is proven to be the best, or the effort is spent."""
    self._strike()
    root = _Open(-math.inf, 0, (0,), [])
    heap = [dataclasses.replace(root, bound=self._bound((0,), self._values(root)))]
    while heap:
      node = heapq.heappop(heap)  # [1]
      if node.bound >= self._cutoff:
        break
      if self.looked >= self.effort:
        return self._optimum(node.bound)
      self.looked += 1
      begun, values = node.boundaries, self._values(node)
      bound = self._bound(begun, values)
      if bound > node.bound:  # [2]
        heapq.heappush(heap, dataclasses.replace(node, bound=bound))
      elif len(begun) == self.stages:  # [3]
        if self.offer((*begun, self.layers)) <= self.best[0]:
          self.descend((*begun, self.layers))
        self._strike_if_due()
      else:
        for item in self._further(begun, values):
          heapq.heappush(heap, item)
    return self._optimum(self.best[0])

  @property
  def _cutoff(self) -> float:
    """The value from which on a partition is no better than the best, rounding allowed for."""
    value = self.best[0]
    return value - _SAME * abs(value) if value < math.inf else value

  def _optimum(self, bound: float) -> Optimum:
    """Returns the best so far, with a bound on all partitions."""
    value, boundaries = self.best
    return Optimum(
      boundaries=boundaries, value=value, lower_bound=min(bound, value), looked=self.looked
    )

  def _add(self, row: Row) -> None:
    """Adds a row to those that bound partitions."""
    table = Table(row, self.sums)
    table.look_ahead(self.ends)
    self.tables.append(table)

  def _values(self, node: _Open) -> list[float]:
    """Returns the values of all rows for a node, including rows added since it was pushed."""
    *before, end = node.boundaries
    if not before:
      return [table.constant for table in self.tables]
    new = self.tables[len(node.values) :]
    values = node.values + [table.until(tuple(before)) for table in new]
    s, start = len(before) - 1, before[-1]
    added = [table.at[s][end] - table.at[s][start] for table in self.tables]
    return [value + more for value, more in zip(values, added, strict=True)]

  def _further(self, begun: Boundaries, values: list[float]) -> Iterator[_Open]:
    """Yields the nodes with one more boundary that may hold something better."""
    s, start, cutoff = len(begun) - 1, begun[-1], self._cutoff
    ends = self.ends[s][start]
    bounds = [-math.inf] * len(ends)
    for table, value in zip(self.tables, values, strict=True):
      at, rest = table.at[s], table.to_come[s + 1]
      base = value - at[start]
      for i, x in enumerate(ends):
        total = base + at[x] + rest[x]
        if table.limit is not None:
          if total > table.limit:
            bounds[i] = math.inf
        elif total > bounds[i]:
          bounds[i] = total
    for bound, x in zip(bounds, ends, strict=True):
      if bound < cutoff:  # [4]
        yield _Open(bound, -s - 1, (*begun, x), values)

  def _bound(self, begun: Boundaries, values: list[float]) -> float:
    """Returns the bound of a node: the largest row, or infinity where a condition cannot hold."""
    s, start = len(begun) - 1, begun[-1]
    found = -math.inf
    for table, value in zip(self.tables, values, strict=True):
      total = value + table.to_come[s][start]
      if table.limit is None:
        if total > found:
          found = total
      elif total > table.limit:
        return math.inf
    return found

  def _strike_if_due(self) -> None:
    """Strikes stages out if the best has improved, or enough rows have been added."""
    value, rows = self._struck_at
    if self.best[0] < value or len(self.tables) >= rows + _STRIKE_EVERY:
      self._strike()

  def _strike(self) -> None:
    """Strikes out the stages that no better partition can contain, until no more are found."""
    cutoff, before = self._cutoff, -1
    while before != (left := sum(len(row) for stage in self.ends for row in stage)):
      before = left
      for table in self.tables:
        back = table.look_back(self.ends)
        table.look_ahead(self.ends)
        for s, stage in enumerate(self.ends):
          at, rest = table.at[s], table.to_come[s + 1]
          for y, row in enumerate(stage):
            base = back[s][y] - at[y]
            stage[y] = [x for x in row if not table.too_large(base + at[x] + rest[x], cutoff)]
    for table in self.tables:
      table.look_ahead(self.ends)
    self._struck_at = (self.best[0], len(self.tables))
