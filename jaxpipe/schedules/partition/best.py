"""The partition with which a schedule ends first, and whether that is proven.

The slowest stage is not all that counts. How long a step takes depends on where the slow stages
stand, on how forwards and backwards share their time, and on what fits in each device's memory at
the schedule's own peak. So the objective here is the simulator's makespan, and the search is exact
(`minimax`); the rules (`rules`) and a local search from them give it a good partition to begin
with.
"""

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
FIXED = frozenset(
  "gpipe 1f1b interleaved-1f1b looped-bfs zb-h1 zb-h2 hanayo chimera bitpipe dualpipe".split()
)
_Limit = float | Sequence[float] | None


def best(
  layers: Sequence[LayerCost],
  schedule: str | Schedule | Callable[[Costs], Schedule],
  *,
  devices: int | None = None,
  microbatches: int | None = None,
  chunks: int | None = None,
  hop: float = 0,
  memory_limit: _Limit = None,
  empty: bool = False,
  effort: int = 20_000,
  **options: object,
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
    hop: latency of sending between two devices, in the layers' unit of time.
    memory_limit: most that a device may hold, parameters and activations, in the layers' unit of
      memory; one number, or one per device.
    empty: whether stages may be empty where there are fewer layers than stages.
    effort: how many partitions and beginnings of them may be looked at.
    options: further arguments of `make_schedule`, for a name.

  Returns:
    The best partition found; `proven` says whether there is no better one.

  Raises:
    ValueError: the sizes do not fit each other, or no partition fits the limit.

  >>> layers = [LayerCost(str(t), forward=t, weight_grad=2 * t) for t in (3, 1, 1, 1, 1, 2)]
  >>> plan = best(layers, "1f1b", devices=3, microbatches=4)
  >>> plan.partition.sizes, plan.makespan, plan.proven
  ((1, 3, 2), 54, True)
  """
  order, limits = _order(
    schedule, devices, microbatches, chunks, hop, memory_limit, len(layers), empty, options
  )
  return best_of_order(order, layers, limits=limits, hop=hop, empty=empty, effort=effort)


def best_of_order(
  order: Order,
  layers: Sequence[LayerCost],
  *,
  limits: tuple[float, ...],
  hop: float,
  empty: bool = False,
  effort: int = 20_000,
  pinned: dict[int, int] | None = None,
) -> Plan:
  """`best` for what a schedule answers; `pinned` stages must begin at these layers."""
  layers = tuple(layers)
  stages = order.placement.stages
  least = least_size(len(layers), stages, empty)
  finite = any(limit < math.inf for limit in limits)
  conditions = order.memory_rows(limits) if finite else []

  def partition(boundaries: Boundaries) -> Partition:
    sizes = tuple(end - start for start, end in itertools.pairwise(boundaries))
    return Partition(layers=layers, sizes=sizes, method="best")

  def judge(boundaries: Boundaries) -> tuple[float, Row | None]:
    found = partition(boundaries)
    return order.makespan(found), order.decisive(found)

  search = Minimax(
    sums=_sums(layers),
    stages=stages,
    least=least,
    rows=[*order.rows(), *conditions],
    judge=judge,
    pinned=pinned,
  )
  starts = [rule(layers, stages, empty=empty).boundaries for rule in RULES.values()]
  if conditions:
    starts.append(_thriftiest(layers, stages, least, conditions, pinned, effort))
  for start in starts:
    search.offer(start)
  search.improve()
  found = search.run(effort)
  if found.boundaries is None:
    raise _too_low(partition(starts[-1]), order, limits, found.lower_bound == math.inf)
  chosen = partition(found.boundaries)
  timeline = simulate(order.schedule(chosen), chosen.costs(hop), chosen.memory)
  plain = order.makespan(uniform(layers, stages, empty=empty))
  return Plan(
    partition=chosen,
    timeline=timeline,
    limits=limits,
    lower_bound=timeline.makespan if found.proven else found.lower_bound,
    proven=found.proven,
    uniform=plain if plain < math.inf else None,
    looked=found.looked,
  )


def _order(
  schedule: str | Schedule | Callable[[Costs], Schedule],
  devices: int | None,
  microbatches: int | None,
  chunks: int | None,
  hop: float,
  memory_limit: _Limit,
  layers: int,
  empty: bool,
  options: dict[str, object],
) -> tuple[Order, tuple[float, ...]]:
  """What answers for the schedule, and each device's limit."""
  if not isinstance(schedule, str):
    if (devices, microbatches, chunks) != (None, None, None) or options:
      raise ValueError(
        "a schedule brings its own sizes; give devices, microbatches, chunks and options with a"
        " name only"
      )
    if isinstance(schedule, Schedule):
      return FixedOrder(schedule, hop), limit_by_device(memory_limit, schedule.devices)
    plan = schedule
    example = plan(Costs(hop=hop))
    order = PlannedOrder(lambda found: plan(found.costs(hop)), hop, example)
    return order, limit_by_device(memory_limit, example.devices)
  if devices is None or microbatches is None:
    raise ValueError(
      f"{schedule} needs its sizes, not devices={devices}, microbatches={microbatches}; give both"
    )
  sizes = {"devices": devices, "microbatches": microbatches, "chunks": chunks, **options}
  # Sizes that do not fit are refused here, before many partitions are asked about them.
  example = make_schedule(schedule, costs=Costs(hop=hop), **sizes)
  limits = limit_by_device(memory_limit, devices)
  plain = options.get("backward") != "deferred" and not options.get("recompute")
  if schedule in FIXED and plain:
    return FixedOrder(example, hop), limits

  def planned(found: Partition) -> Schedule:
    held = [sum(found.stages[s].parameters for s in row) for row in example.placement.table]
    left = [limit - parameters for limit, parameters in zip(limits, held, strict=True)]
    if min(left) < 0:
      raise ValueError("the parameters alone are above the limit")
    return make_schedule(
      schedule, costs=found.costs(hop), memory=found.memory, memory_limit=left, **sizes
    )

  return PlannedOrder(planned, hop, example), limits


def _sums(layers: Sequence[LayerCost]) -> list[list[float]]:
  """By resource, its sum over the first 0, 1, ... L layers."""
  return [
    list(itertools.accumulate((getattr(layer, name) for layer in layers), initial=0))
    for name in RESOURCES
  ]


def _thriftiest(
  layers: tuple[LayerCost, ...],
  stages: int,
  least: int,
  conditions: Sequence[Row],
  pinned: dict[int, int] | None,
  effort: int,
) -> Boundaries:
  """The partition whose largest excess over a limit is least: if it does not fit, none does."""
  sums = _sums(layers)
  # What is above the limit, as an objective.
  rows = [
    Row(weights=row.weights, constant=-row.limit)
    for row in conditions
    if row.limit is not None and row.limit < math.inf
  ]
  search = Minimax(
    sums=sums, stages=stages, least=least, rows=rows, judge=lambda _: (0, None), pinned=pinned
  )
  search.judge = lambda boundaries: (search.largest_row(boundaries), None)
  found = search.run(effort)
  return found.boundaries or uniform(layers, stages, empty=True).boundaries


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
