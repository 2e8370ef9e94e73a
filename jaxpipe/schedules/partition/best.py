"""Finds the partition with which a schedule ends first, and says whether that is proven.

The slowest stage is not all that counts. How long a step takes depends on where the slow stages
stand, on how forwards and backwards share their time, and on what fits in each device's memory at
the schedule's own peak. So the objective here is the simulator's makespan, and the search is exact
(`solve`).
"""

import functools
from collections.abc import Callable, Sequence

from jaxpipe.schedules.build import make_schedule
from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.schedules.partition.orders import FixedOrder, Order, PlannedOrder
from jaxpipe.schedules.partition.partition import Partition
from jaxpipe.schedules.partition.plan import Plan
from jaxpipe.schedules.partition.solve import solve
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import limit_by_device

# Families whose order is the same whatever stages cost; the others plan around them.
FIXED = (
  "gpipe",
  "1f1b",
  "eager-1f1b",
  "interleaved-1f1b",
  "looped-bfs",
  "zb-h1",
  "zb-h2",
  "chimera",
)
_Limit = float | Sequence[float] | None
# Returns the `Order` of a schedule by the time of a hop.
_OrderOf = Callable[[float], Order]


def best(
  layers: Sequence[LayerCost],
  schedule: str | Schedule | Callable[[Costs], Schedule],
  *,
  devices: int | None = None,
  microbatches: int | None = None,
  chunks: int | None = None,
  backward: str | None = None,
  hop: float = 0,
  bandwidth: float | None = None,
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
    bandwidth: bytes that a link sends in one unit of time; every hop then takes longer by what the
      widest boundary of the partition takes, because all are sent at that width.
    memory_limit: most that a device may hold, parameters and activations, in the layers' unit of
      memory; one number, or one per device.
    empty: whether stages may be empty where there are fewer layers than stages.
    effort: how many partitions and beginnings of them may be looked at; one that a schedule is
      planned for counts as 100. One is looked at in any case.
    options: arguments that only this family understands, for a name.

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
    # As a function of any arguments: which `options` there are depends on the family.
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
    order_of, limits = _named(build, fixed, memory_limit)
  elif (devices, microbatches, chunks, backward) != (None,) * 4 or options:
    raise ValueError("a schedule brings its own sizes and options; give them with a name only")
  else:
    order_of, limits = _given(schedule, memory_limit)
  return solve(
    order_of,
    (layers,),
    limits=limits,
    hop=hop,
    bandwidth=bandwidth,
    empty=empty,
    effort=effort,
  )


def _given(
  schedule: Schedule | Callable[[Costs], Schedule], limit: _Limit
) -> tuple[_OrderOf, tuple[float, ...]]:
  """Returns the orders, and the limits by device, of a given schedule or planner."""
  if isinstance(schedule, Schedule):
    fixed = schedule
    return lambda hop: FixedOrder(fixed, hop), limit_by_device(limit, fixed.devices)
  plan, example = schedule, schedule(Costs())
  limits = limit_by_device(limit, example.devices)

  def order_of(hop: float) -> Order:
    """Returns the planner where a hop takes so long."""
    return PlannedOrder(lambda found: plan(found.costs(hop)), hop, example, limits)

  return order_of, limits


def _named(
  build: Callable[..., Schedule], fixed: bool, limit: _Limit
) -> tuple[_OrderOf, tuple[float, ...]]:
  """Returns the orders, and the limits by device, of a family whose order is fixed or planned."""
  # Sizes that do not fit are refused here, before many partitions are asked about them.
  example = build()
  limits = limit_by_device(limit, example.devices)
  if fixed:
    return lambda hop: FixedOrder(example, hop), limits

  def planned(found: Partition, hop: float) -> Schedule:
    """Plans for a partition's costs, in the memory that its parameters leave."""
    held = [sum(found.stages[s].parameters for s in row) for row in example.placement.table]
    left = [limit - parameters for limit, parameters in zip(limits, held, strict=True)]
    return build(costs=found.costs(hop), memory=found.memory, memory_limit=left)

  def order_of(hop: float) -> Order:
    """Returns the planner where a hop takes so long."""
    return PlannedOrder(lambda found: planned(found, hop), hop, example, limits)

  return order_of, limits
