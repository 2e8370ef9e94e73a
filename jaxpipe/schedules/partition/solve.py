"""Searches for the best partition of a schedule: starts, widths of boundaries in turn, and proof.

[1] widths: with a bandwidth, a hop takes as long as the widest boundary, so partitions are
    searched width by width, narrow ones first: those whose boundaries are no wider, with the hop
    that this width takes. A narrower one among them would only be charged too much.
[2] starts: the partition of each rule, and the one that needs least memory; from each, boundaries
    are moved while that helps
[3] branch and bound (`minimax`) below the best so far
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.schedules.partition.minimax import Minimax, Optimum
from jaxpipe.schedules.partition.orders import RESOURCES, Order, memory
from jaxpipe.schedules.partition.partition import Partition
from jaxpipe.schedules.partition.plan import Plan
from jaxpipe.schedules.partition.rows import Boundaries, Row
from jaxpipe.schedules.partition.rules import RULES, least_size, uniform
from jaxpipe.schedules.simulate import simulate

_Rule = Callable[..., Partition]


@dataclasses.dataclass(frozen=True)
class _Models:
  """The models to be cut: one, or several that share the stages evenly.

  Attributes:
    models: the layers of each model, first stages' model first.
    stages: number of stages of all models together, S.
    empty: whether stages may be empty where there are fewer layers than stages.
  """

  models: tuple[tuple[LayerCost, ...], ...]
  stages: int
  empty: bool

  @functools.cached_property
  def layers(self) -> tuple[LayerCost, ...]:
    """The L layers of all models."""
    return tuple(itertools.chain(*self.models))

  @functools.cached_property
  def least(self) -> int:
    """The fewest layers that a stage may have."""
    return min(least_size(len(m), self.stages // len(self.models), self.empty) for m in self.models)

  @functools.cached_property
  def pinned(self) -> dict[int, int]:
    """Stage -> layer: where each model's first stage must begin, and the last stage end."""
    firsts = itertools.accumulate(map(len, self.models), initial=0)
    return {i * self.stages // len(self.models): first for i, first in enumerate(firsts)}

  @functools.cached_property
  def sums(self) -> list[list[float]]:
    """For each of `RESOURCES`, its sums over the first 0, 1, ... L layers."""
    return [
      list(itertools.accumulate((getattr(layer, name) for layer in self.layers), initial=0))
      for name in RESOURCES
    ]

  def partition(self, boundaries: Boundaries) -> Partition:
    """Returns the partition of S+1 boundaries."""
    sizes = tuple(end - start for start, end in itertools.pairwise(boundaries))
    return Partition(layers=self.layers, sizes=sizes, method="best")

  def by_rule(self, rule: _Rule) -> Partition:
    """Returns the partition whose models are each cut by a rule."""
    each = self.stages // len(self.models)
    sizes = itertools.chain(*(rule(m, each, empty=self.empty).sizes for m in self.models))
    return Partition(layers=self.layers, sizes=tuple(sizes), method=rule.__name__)

  def width(self, boundary: int) -> float:
    """Returns the bytes that are sent where a stage begins at a layer; none between models."""
    return 0 if boundary in self.pinned.values() else self.layers[boundary - 1].output


def solve(
  order_of: Callable[[float], Order],
  models: Sequence[Sequence[LayerCost]],
  *,
  limits: tuple[float, ...],
  hop: float = 0,
  bandwidth: float | None = None,
  empty: bool = False,
  effort: int = 20_000,
) -> Plan:
  """Searches for the best partition of one model, or of several that share a schedule's stages.

  Args:
    order_of: returns the schedule's `Order` by the time of a hop.
    models: the layers of each model, first stages' model first; each gets equally many stages.
    limits: P limits, the most memory that each device may hold; infinite without a limit.
    hop: latency between two devices, in the layers' unit of time.
    bandwidth: bytes that a link sends in one unit of time; None if sending takes the latency only.
    empty: whether stages may be empty where there are fewer layers than stages.
    effort: most partitions and beginnings of them that may be looked at.

  Returns:
    The best partition found.

  Raises:
    ValueError: the sizes do not fit each other, or no partition fits the limits.
  """
  if bandwidth is not None and not bandwidth > 0:
    raise ValueError(f"bandwidth={bandwidth} sends nothing; use more than 0, or None")
  order = order_of(hop)
  work = _Models(tuple(map(tuple, models)), order.placement.stages, empty)
  best: Optimum | None = None
  best_hop, looked, bounds = hop, 0, []
  for width in _widths(work, bandwidth):  # [1]
    slow = hop + (width / bandwidth if bandwidth else 0)
    found = _search(order_of(slow), work, limits, width, best, effort - looked)
    looked += found.looked
    bounds.append(found.lower_bound)
    if best is None or found.value < best.value:
      best, best_hop = found, slow
  assert best is not None  # there is always a width
  if best.boundaries is None:
    raise _too_low(order, work, limits, proven=min(bounds) == math.inf)
  best = dataclasses.replace(best, lower_bound=min(best.value, *bounds))
  return _plan(order_of, work, limits, best, best_hop, hop, bandwidth, looked)


def _widths(work: _Models, bandwidth: float | None) -> list[float]:
  """Returns the widths of boundaries to search with, narrow ones first."""
  if bandwidth is None:
    return [math.inf]
  return sorted({work.width(x) for x in range(1, len(work.layers) + 1)})


def _search(
  order: Order,
  work: _Models,
  limits: tuple[float, ...],
  width: float,
  best: Optimum | None,
  effort: int,
) -> Optimum:
  """Returns the best partition with boundaries no wider, or the given one if that is better."""

  def judge(boundaries: Boundaries) -> tuple[float, Row | None]:
    """Returns the makespan, and the row that equals it."""
    found = work.partition(boundaries)
    return order.makespan(found), order.decisive(found)

  conditions = order.memory_rows(limits) if min(limits) < math.inf else []
  make = _minimax(work, width, effort)
  search = make(rows=[*order.rows(), *conditions], judge=judge, price=order.price)
  if best is not None:
    search.best = (best.value, best.boundaries)
  for start in _starts(work, make, conditions):  # [2]
    search.descend(start)
  return search.run()  # [3]


def _minimax(work: _Models, width: float, effort: int) -> Callable[..., Minimax]:
  """Returns what makes a search over partitions with boundaries no wider than `width`."""
  return functools.partial(
    Minimax,
    sums=work.sums,
    stages=work.stages,
    least=work.least,
    effort=effort,
    pinned=work.pinned,
    barred={x for x in range(1, len(work.layers) + 1) if work.width(x) > width},
  )


def _starts(
  work: _Models, make: Callable[..., Minimax], conditions: Sequence[Row]
) -> Iterator[Boundaries]:
  """Yields the partitions from which boundaries are moved: [2]."""
  yield from (work.by_rule(rule).boundaries for rule in RULES.values())
  if conditions:
    thriftiest = _thriftiest(make, conditions)
    if thriftiest is not None:
      yield thriftiest


def _thriftiest(make: Callable[..., Minimax], conditions: Sequence[Row]) -> Boundaries | None:
  """Returns the partition whose largest excess over a limit is least.

  If that one does not fit the limits, none does.
  """
  rows = [
    dataclasses.replace(row, constant=row.constant - row.limit, limit=None)
    for row in conditions
    if row.limit is not None and row.limit < math.inf
  ]
  search: Minimax = make(rows=rows, judge=lambda found: (search.largest_row(found), None))
  return search.run().boundaries


def _plan(
  order_of: Callable[[float], Order],
  work: _Models,
  limits: tuple[float, ...],
  found: Optimum,
  found_hop: float,
  hop: float,
  bandwidth: float | None,
  looked: int,
) -> Plan:
  """Returns a found partition with its simulated schedule, and the uniform one's makespan."""
  assert found.boundaries is not None
  partition = work.partition(found.boundaries)
  schedule = order_of(found_hop).schedule(partition)
  timeline = simulate(schedule, partition.costs(found_hop), partition.memory)
  equal = work.by_rule(uniform)
  widest = max(map(work.width, equal.boundaries[1:-1]), default=0)
  plain = order_of(hop + (widest / bandwidth if bandwidth else 0)).makespan(equal)
  return Plan(
    partition=partition,
    timeline=timeline,
    hop=found_hop,
    limits=limits,
    lower_bound=timeline.makespan if found.proven else found.lower_bound,
    proven=found.proven,
    uniform=plain if plain < math.inf else None,
    looked=looked,
  )


def _too_low(order: Order, work: _Models, limits: Sequence[float], *, proven: bool) -> ValueError:
  """Returns the error that says which device holds too much with the partition nearest to fit."""
  make = _minimax(work, math.inf, 20_000)
  boundaries = _thriftiest(make, order.memory_rows(limits))
  thriftiest = work.partition(boundaries) if boundaries else work.by_rule(uniform)
  L, S, sizes = len(work.layers), work.stages, list(thriftiest.sizes)
  try:
    held = memory(thriftiest, order.schedule(thriftiest))
  except ValueError as error:  # a schedule that plans within the limits says it itself
    return ValueError(f"no partition of {L} layers in {S} stages fits: with {sizes}, {error}")
  d = max(range(len(held)), key=lambda d: held[d] - limits[d])
  return ValueError(
    f"no partition of {L} layers in {S} stages {'fits' if proven else 'that was found fits'}:"
    f" with {sizes} device {d} holds {held[d]}, above memory_limit={limits[d]}; use"
    f" memory_limit={held[d]}, more devices or a schedule that holds less"
  )
