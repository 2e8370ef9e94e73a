"""SkipPipe: microbatches visit some of the stages (Blagoev et al., 2025, arXiv:2502.19913).

P=4, M=4, 3 visits each, a backward as long as two forwards:

  device 0 | F0 F1 F2 F3          B0--- B1--- B2--- B3--- | peak 4
  device 1 |    F0 F1    F3 B0--- B1--- B3---             | peak 3
  device 2 |       F0 B0--- F2 F3 B3--- B2---             | peak 2
  device 3 |          F1 B1--- F2 B2---                   | peak 1

Models bear it that a microbatch leaves stages out, or takes them in another order, so the path of
each may be chosen to keep clear of the others' and of slow devices. Every path begins at the first
stage; the others have equally many visits, or one more. By default a path has two thirds of the
stages, and more if some stage would be left out by all.
`paths` of the schedule says who goes where.

The search (`paths`) is for small pipelines; in large ones the visits are dealt in turn. In the
paper nodes are also assigned to stages; here that is the placement, which may hold a stage on
several devices. A pass here takes a device's time for its stage; loss and head take none of their
own.
"""

import math
from collections.abc import Sequence

from jaxpipe.schedules.actions import ScheduleError
from jaxpipe.schedules.costs import memory_changes
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.paths import find_routes
from jaxpipe.schedules.planning.routes import Network, Routes, dispatch
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec, limit_by_device

# Bound on the search of the registered family, in passes.
_WORK = 20_000


def skippipe(spec: Spec) -> Schedule:
  """Builds SkipPipe: paths through a part of the stages, with one stage per device.

  Args:
    spec: devices and microbatches; `costs` and `memory_limit` to plan with; the option `visits` is
      the number of stages on a path, by default two thirds of them.

  Returns:
    The schedule, its backward fused, with paths.

  Raises:
    ValueError: there are fewer stages than visits, or a device cannot hold one microbatch.
  """
  P = spec.devices
  times, changes = spec.costs.durations(P), memory_changes(spec.memory, P)
  # Microbatches that fit into a device's memory, each held from its F on.
  capacity = tuple(
    limit // change if change > 0 else math.inf
    for limit, change in zip(spec.limits(), changes[Kind.F], strict=True)
  )
  return schedule_routes(
    make_network(
      Placement.loop(P),
      spec.microbatches,
      spec.options.get("visits"),
      forward=times[Kind.F],
      backward=times[Kind.B],
      capacity=capacity,
      hop=spec.costs.hop,
    ),
    work=_WORK,
  )


def plan_paths(
  placement: Placement,
  microbatches: int,
  visits: int | None = None,
  *,
  forward: float | Sequence[float] = 1,
  backward: float | Sequence[float] | None = None,
  memory_limit: float | Sequence[float] | None = None,
  cap: int | None = None,
  hop: float = 0,
  reorder: bool = False,
  seed: int = 0,
) -> Schedule:
  """Searches for paths through unlike devices.

  Args:
    placement: one stage per device; a stage may live on several.
    microbatches: number of microbatches, M.
    visits: stages on a path; by default two thirds of them.
    forward: time of F, one number or one per device.
    backward: time of B; by default one and a half times that of F.
    memory_limit: most microbatches that a device may hold, one number or one per device.
    cap: most microbatches that may visit any stage but the first; by default all of these have
      equally many, or one more.
    hop: latency between devices.
    reorder: whether a path may take its stages in any order, after the first.
    seed: of the search.

  Returns:
    A checked schedule with paths, its backward fused.

  Raises:
    ValueError: the numbers do not fit each other, or no paths were found that run to the end.
  """
  P = placement.devices
  forwards = tuple(forward) if isinstance(forward, Sequence) else (forward,) * P
  if backward is None:
    backward = tuple(1.5 * time for time in forwards)
  backwards = tuple(backward) if isinstance(backward, Sequence) else (backward,) * P
  network = make_network(
    placement,
    microbatches,
    visits,
    forward=forwards,
    backward=backwards,
    capacity=limit_by_device(memory_limit, P),
    cap=cap,
    hop=hop,
    reorder=reorder,
  )
  return schedule_routes(network, seed=seed).check()


def make_network(
  placement: Placement,
  microbatches: int,
  visits: int | None,
  *,
  forward: tuple[float, ...],
  backward: tuple[float, ...],
  capacity: tuple[float, ...],
  cap: int | None = None,
  hop: float = 0,
  reorder: bool = False,
) -> Network:
  """Checks the numbers of a network and fills in those that follow from others.

  Args:
    placement: one stage per device; a stage may live on several.
    microbatches: number of microbatches, M.
    visits: stages on a path; None for two thirds of them, or as many as it takes to visit all.
    forward: P times of F, by device.
    backward: P times of B, by device.
    capacity: P numbers, the most microbatches that each device may hold from F to B.
    cap: most microbatches that may visit any stage but the first; None where all of these have
      equally many, or one more.
    hop: latency between devices.
    reorder: whether a path may take its stages in any order, after the first.

  Returns:
    The network.

  Raises:
    ValueError: the numbers do not fit each other.
  """
  S, P = placement.stages, placement.devices
  # With few microbatches, more visits: a stage that nobody visits would not learn, nor its device
  # do anything.
  k = visits or min(S, max(math.ceil(2 * S / 3), 1 + math.ceil((S - 1) / microbatches)))
  if not 1 <= k <= S:
    raise ValueError(f"skippipe cannot visit {k} of {S} stages; use visits={S} or fewer")
  if placement.chunks > 1:
    raise ValueError(f"skippipe has 1 stage per device, not {placement.chunks}; use chunks=1")
  for word, times in (("forward", forward), ("backward", backward)):
    if len(times) != P:
      raise ValueError(f"{word} lists {len(times)} devices, there are {P}; give one number, or {P}")
  for d, most in enumerate(capacity):
    if most < 1:
      raise ValueError(
        f"device {d} has memory for {most:g} microbatches; use a memory_limit for 1 or more"
      )
  each = microbatches * (k - 1) / max(S - 1, 1)
  return Network(
    placement=placement,
    microbatches=microbatches,
    visits=k,
    cap=math.ceil(each) if cap is None else min(cap, microbatches),
    least=math.floor(each) if cap is None else 0,
    forward=forward,
    backward=backward,
    capacity=capacity,
    hop=hop,
    reorder=reorder,
  )


def schedule_routes(
  network: Network, routes: Routes | None = None, *, seed: int = 0, work: int | None = None
) -> Schedule:
  """Builds the schedule of given routes, by default of those that a search finds.

  Args:
    network: devices, times and capacities.
    routes: one route per microbatch; None to search for them.
    seed: of the search.
    work: bound on the search, in passes; None for the search's own.

  Raises:
    ScheduleError: the routes block each other, which takes `reorder` and little memory.
  """
  if routes is None:
    more = {} if work is None else {"work": work}
    routes = find_routes(network, seed=seed, **more)
  run = dispatch(network, routes)
  if run.makespan == math.inf:
    raise ScheduleError("microbatches block each other for lack of memory; use a larger limit")
  paths = tuple(tuple(network.stage(d) for d in route) for route in routes)
  return Schedule("skippipe", network.placement, network.microbatches, run.order, paths)
