"""The partition with which a schedule ends first, and whether that is proven.

The slowest stage is not all that counts. How long a step takes depends on where the slow stages
stand, on how forwards and backwards share their time, and on what fits in each device's memory at
the schedule's own peak. So the objective here is the simulator's makespan, and the search is exact
(`minimax`); the rules (`rules`) and a local search from them give it a good partition to begin
with.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

from jaxpipe.schedules.build import make_schedule
from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.schedules.partition.minimax import Boundaries, Minimax, Row
from jaxpipe.schedules.partition.orders import RESOURCES, FixedOrder, Order, PlannedOrder, memory
from jaxpipe.schedules.partition.partition import Partition
from jaxpipe.schedules.partition.plan import Plan
from jaxpipe.schedules.partition.rules import RULES, least_size, uniform
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import simulate
from jaxpipe.schedules.spec import limit_by_device

# Families whose order is the same whatever stages cost; the others plan around them.
FIXED = ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb-h1", "zb-h2", "chimera")
_Limit = float | Sequence[float] | None


def best(
  layers: Sequence[LayerCost],
  schedule: str | Schedule | Callable[[Costs], Schedule],
  *,
  devices: int | None = None,
  microbatches: int | None = None,
  chunks: int | None = None,
  backward: str | None = None,
  hop: float = 0,
  memory_limit: _Limit = None,
  empty: bool = False,
  effort: int = 20_000,
  **options: int,
) -> Plan:
  """Cuts layers into stages so that a schedule's simulated step is shortest.

  Effort is counted, not timed: every process of a job that asks the same gets the same partition.

  Args:
    layers: the layers in model order.
    schedule: the name of one, which takes `devices` and the arguments after it; a schedule, whose
      order is kept; or a function of the stages' costs that plans one around them.
    devices: number of devices, P, for a name.
    microbatches: number of microbatches, M, for a name.
    chunks: stages per device, V, for a name; by default the family's own number.
    backward: `fused`, `split` or `deferred`, for a name; by default the family's own way.
    hop: latency of sending between two devices, in the layers' unit of time.
    memory_limit: most that a device may hold, parameters and activations, in the layers' unit of
      memory; one number, or one per device.
    empty: whether stages may be empty where there are fewer layers than stages.
    effort: how many partitions and beginnings of them may be looked at; one that a schedule is
      planned for counts as 100. One is looked at in any case.
    options: what only this family understands, for a name.

  Returns:
    The best partition found; `proven` says whether there is no better one.

  Raises:
    ValueError: the sizes do not fit each other, or no partition fits the limit.

  >>> layers = [LayerCost(str(t), forward=t, weight_grad=2 * t) for t in (3, 1, 1, 1, 1, 2)]
  >>> plan = best(layers, "1f1b", devices=3, microbatches=4)
  >>> plan.partition.sizes, plan.makespan, plan.proven
  ((1, 3, 2), 54, True)
  """
  if isinstance(schedule, str):
    if devices is None or microbatches is None:
      raise ValueError(
        f"{schedule} has no sizes with devices={devices}, microbatches={microbatches}; give both"
      )
    # As a function of any arguments, for what `options` holds is the family's affair.
    make: Callable[..., Schedule] = make_schedule
    build = functools.partial(
      make,
      schedule,
      devices=devices,
      microbatches=microbatches,
      chunks=chunks,
      backward=backward,
      **options,
    )
    fixed = schedule in FIXED and backward != "deferred"
    order, limits = _named(build, fixed, hop, memory_limit)
  elif (devices, microbatches, chunks, backward) != (None,) * 4 or options:
    raise ValueError("a schedule brings its own sizes and options; give them with a name only")
  else:
    order, limits = _given(schedule, hop, memory_limit)
  return best_of_order(order, (layers,), limits=limits, hop=hop, empty=empty, effort=effort)


def best_of_order(
  order: Order,
  models: Sequence[Sequence[LayerCost]],
  *,
  limits: tuple[float, ...],
  hop: float,
  empty: bool = False,
  effort: int = 20_000,
) -> Plan:
  """`best` for what a schedule answers, of one model or several that share the stages evenly."""
  layers = tuple(itertools.chain(*models))
  stages = order.placement.stages
  each = stages // len(models)
  least = min(least_size(len(model), each, empty) for model in models)
  firsts = itertools.accumulate(map(len, models), initial=0)
  pinned = {i * each: first for i, first in enumerate(firsts)}

  def partition(boundaries: Boundaries, method: str = "best") -> Partition:
    sizes = tuple(end - start for start, end in itertools.pairwise(boundaries))
    return Partition(layers=layers, sizes=sizes, method=method)

  def by_rule(rule: Callable[..., Partition]) -> Partition:
    parts = [rule(model, each, empty=empty).sizes for model in models]
    return Partition(layers=layers, sizes=tuple(itertools.chain(*parts)))

  def judge(boundaries: Boundaries) -> tuple[float, Row | None]:
    found = partition(boundaries)
    return order.makespan(found), order.decisive(found)

  conditions = order.memory_rows(limits) if min(limits) < math.inf else []
  make = functools.partial(
    Minimax, sums=_sums(layers), stages=stages, least=least, pinned=pinned, effort=effort
  )
  search = make(rows=[*order.rows(), *conditions], judge=judge, price=order.price)
  starts = [by_rule(rule).boundaries for rule in RULES.values()]
  if conditions:
    starts.append(_thriftiest(make, conditions) or starts[0])
  for start in starts:
    search.descend(start)
  found = search.run()
  if found.boundaries is None:
    raise _too_low(partition(starts[-1]), order, limits, found.lower_bound == math.inf)
  chosen = partition(found.boundaries)
  timeline = simulate(order.schedule(chosen), chosen.costs(hop), chosen.memory)
  plain = order.makespan(by_rule(uniform))
  return Plan(
    partition=chosen,
    timeline=timeline,
    limits=limits,
    lower_bound=timeline.makespan if found.proven else found.lower_bound,
    proven=found.proven,
    uniform=plain if plain < math.inf else None,
    looked=found.looked,
  )


def _given(
  schedule: Schedule | Callable[[Costs], Schedule], hop: float, limit: _Limit
) -> tuple[Order, tuple[float, ...]]:
  if isinstance(schedule, Schedule):
    return FixedOrder(schedule, hop), limit_by_device(limit, schedule.devices)
  example = schedule(Costs(hop=hop))
  limits = limit_by_device(limit, example.devices)
  return PlannedOrder(lambda found: schedule(found.costs(hop)), hop, example, limits), limits


def _named(
  build: Callable[..., Schedule], fixed: bool, hop: float, limit: _Limit
) -> tuple[Order, tuple[float, ...]]:
  # Sizes that do not fit are refused here, before many partitions are asked about them.
  example = build(costs=Costs(hop=hop))
  limits = limit_by_device(limit, example.devices)
  if fixed:
    return FixedOrder(example, hop), limits

  def planned(found: Partition) -> Schedule:
    held = [sum(found.stages[s].parameters for s in row) for row in example.placement.table]
    left = [limit - parameters for limit, parameters in zip(limits, held, strict=True)]
    return build(costs=found.costs(hop), memory=found.memory, memory_limit=left)

  return PlannedOrder(planned, hop, example, limits), limits


def _sums(layers: Sequence[LayerCost]) -> list[list[float]]:
  """By resource, its sum over the first 0, 1, ... L layers."""
  return [
    list(itertools.accumulate((getattr(layer, name) for layer in layers), initial=0))
    for name in RESOURCES
  ]


def _thriftiest(make: Callable[..., Minimax], conditions: Sequence[Row]) -> Boundaries | None:
  """The partition whose largest excess over a limit is least: if it does not fit, none does."""
  rows = [
    dataclasses.replace(row, constant=row.constant - row.limit, limit=None)
    for row in conditions
    if row.limit is not None and row.limit < math.inf
  ]
  search: Minimax = make(rows=rows, judge=lambda found: (search.largest_row(found), None))
  return search.run().boundaries


def _too_low(
  thriftiest: Partition, order: Order, limits: Sequence[float], proven: bool
) -> ValueError:
  """Says which device holds too much, with the partition that comes nearest."""
  L, S = len(thriftiest.layers), len(thriftiest.sizes)
  sizes = list(thriftiest.sizes)
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
