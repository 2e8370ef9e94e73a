"""A training step compiled ahead of time, for devices that need not be there.

A jitted step is compiled from shapes that know where they lie; no parameter is ever made. For a TPU
the compiler also says how many cycles each action takes, from which the schedule gives a step time.

References:
  Cloud TPU documentation, system architecture: HBM and matrix units of each generation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.pipeline.compiled.action_paths import SCOPES
from jaxpipe.pipeline.compiled.cycles import Cost
from jaxpipe.pipeline.compiled.step import CompiledStep
from jaxpipe.schedules import Costs, Schedule, Timeline, simulate
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.chips import peak_flops
from jaxpipe.training.plan.state import state_shardings

Tree = Any

_JAXPRS = (core.Jaxpr, core.ClosedJaxpr)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU generation.

  Attributes:
    memory: bytes of HBM.
    flops_per_cycle: 2 * 128 * 128 for each of its matrix units.
  """

  memory: float
  flops_per_cycle: int | None


_MXU = 2 * 128 * 128
# By `jax.Device.device_kind`. v6e has no clock: its documented matrix units and peak would make it
# 3.5 GHz, far from what its compiler's own estimate of a large matmul allows.
_CHIPS = {
  "TPU v4": Chip(32e9, 8 * _MXU),
  "TPU v5 lite": Chip(16e9, 4 * _MXU),
  "TPU v5": Chip(95e9, 8 * _MXU),
  "TPU v6 lite": Chip(32e9, None),
}


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
  """What one device of a program may use: a chip, or the part of it that is a device.

  Attributes:
    kind: its `device_kind`.
    memory: bytes; None if unknown.
    peak: dense bfloat16 FLOP/s; None if unknown.
    clock: cycles per second, peak over FLOPs per cycle; None if unknown.
  """

  kind: str
  memory: int | None
  peak: float | None
  clock: float | None

  @classmethod
  def of(cls, devices: Sequence[Any]) -> DeviceSpec:
    """What each of these devices is."""
    kind = devices[0].device_kind
    chip, peak = _CHIPS.get(kind), peak_flops(kind)
    if chip is None:
      stats = devices[0].memory_stats() or {}
      return cls(kind, stats.get("bytes_limit"), peak, None)
    # On v4 each of a chip's two cores may be a device of its own.
    each = len(devices) // len({tuple(device.coords) for device in devices})
    clock = peak / chip.flops_per_cycle if peak and chip.flops_per_cycle else None
    return cls(kind, int(chip.memory / each), peak and peak / each, clock)


def placed_shapes(state: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """A state of shapes that know where they lie."""
  return jax.tree.map(
    lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
    state,
    state_shardings(state, stack, schedule, mesh),
  )


def on_all(batch: Tree, mesh: Mesh) -> Tree:
  """A batch of shapes that lies on every device, as the training loop's does."""
  everywhere = NamedSharding(mesh, Spec())
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), batch)


def local_bytes(tree: Tree) -> int:
  """Bytes of a tree of placed shapes on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def ring_shapes(jaxpr: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
  """Yields (dtype, shape) on one device of the rings: what is allocated outside all branches.

  A ring of one slot is left out: it looks like what is put into it.
  """
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if equation.primitive.name == "empty":
      shape = equation.outvars[0].aval
      if shape.shape[0] > 1:
        yield shape.dtype, shape.shape
    # What a branch allocates is scratch, gone with the action.
    elif equation.primitive.name != "cond":
      for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, _JAXPRS)):
        if isinstance(inner, _JAXPRS):
          yield from ring_shapes(inner)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What the compiler's cycles imply for a whole step.

  Attributes:
    timeline: of the schedule, in cycles; devices that exchange wait for each other every tick.
    seconds: of a step, what runs once a step (reductions, optimizer) included.
  """

  timeline: Timeline
  seconds: float


def estimate(
  found: CompiledStep, schedule: Schedule, device: DeviceSpec, slack: int = 0
) -> Estimate | None:
  """Returns the step time on paper, None where cycles or clock are unknown."""
  actions = {scope: cost for scope in SCOPES if (cost := found.action(scope))}
  if device.clock is None or not {"F"} < actions.keys():
    return None
  costs = _costs(actions, found.every_tick.most, schedule.stages, schedule.devices)
  timeline = simulate(schedule, costs, execution="coupled", slack=slack)
  return Estimate(timeline, (timeline.makespan + found.once.most) / device.clock)


def _costs(actions: Mapping[str, Cost], tick: int, stages: int, devices: int) -> Costs:
  """Cycles as costs: every action also pays for the tick that it runs on.

  The last stage takes the dearest way through its branches, the others the cheapest. A fused B
  counts as two halves. S and T share three P-ths of the head.
  """

  def by_stage(name: str, share: float = 1) -> list[float]:
    cost = actions[name]
    least, most = (share * (cycles + tick) for cycles in (cost.least, cost.most))
    return [least] * (stages - 1) + [most]

  forward = by_stage("F")
  # Embedding, and the head with its gradient.
  for end, stage in (("first_stage", 0), ("last_stage", -1)):
    if end in actions:
      forward[stage] += actions[end].most
  return Costs(
    forward=forward,
    input_grad=by_stage("I") if "I" in actions else by_stage("B", 0.5),
    weight_grad=by_stage("W") if "W" in actions else by_stage("B", 0.5),
    recompute=by_stage("R") if "R" in actions else None,
    head=devices * sum(actions[k].most + tick for k in ("S", "T") if k in actions) / 3,
  )
