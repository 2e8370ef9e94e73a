"""A training step compiled ahead of time, for devices that need not be there.

JAX compiles a step from shapes alone if these carry their shardings, so that the program of a model
of any size can be had, and read, without making one parameter. For a TPU the compiler also notes
its own estimate of the cycles that every instruction takes. Summed up by action (F, I, W, ...) they
are costs of the schedule, and the schedule's simulation gives the time of a step:

    placed_shapes, on_all    arguments of the step, as shapes with shardings
    ring_shapes              ring buffers of the traced step, to find copies of them when compiled
    estimate                 cycles by action -> seconds of a step
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
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
from jaxpipe.training.chips import DeviceSpec
from jaxpipe.training.plan.state import state_shardings

Tree = Any

_JAXPRS = (core.Jaxpr, core.ClosedJaxpr)


def placed_shapes(state: Tree, stack: LayerStack, schedule: Schedule, mesh: Mesh) -> Tree:
  """Gives every shape of a training state the sharding that its array would have.

  Args:
    state: `jax.ShapeDtypeStruct`s, such as `state_shapes` returns.
    stack, schedule, mesh: what is trained; they decide where parameters lie, and moments with them.

  Returns:
    The state's tree, of `jax.ShapeDtypeStruct`s with shardings.
  """
  return jax.tree.map(
    lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
    state,
    state_shardings(state, stack, schedule, mesh),
  )


def on_all(batch: Tree, mesh: Mesh) -> Tree:
  """Gives the shapes of a batch, leaves [B, ...], the sharding that is whole on every device."""
  everywhere = NamedSharding(mesh, Spec())
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), batch)


def ring_shapes(jaxpr: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
  """Finds the ring buffers of a step: what it allocates outside of all conditionals.

  A ring of one slot is left out, since nothing tells a copy of it from a copy of the value in it.

  Args:
    jaxpr: a `jax.extend.core.Jaxpr` or `ClosedJaxpr` of the step.

  Yields:
    Dtype and shape [slots, ...] of each, as one device holds it.
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
  """The time of a whole step that the compiler's cycles imply.

  Attributes:
    timeline: the simulated schedule, times in cycles; devices that exchange on a tick wait for each
      other.
    seconds: of a step, with what runs once in it (reductions of gradients, optimizer).
  """

  timeline: Timeline
  seconds: float


def estimate(
  found: CompiledStep, schedule: Schedule, device: DeviceSpec, slack: int = 0
) -> Estimate | None:
  """Estimates the time of a step whose ticks all run in one loop.

  Args:
    found: the compiled step, with the cycles of its actions.
    schedule: that it runs.
    device: one of those that it was compiled for; its clock turns cycles into seconds.
    slack: ticks that a transfer may take beyond its own.

  Returns:
    The estimate; None where the cycles of F and of a backward, or the clock, are unknown.
  """
  actions = {scope: cost for scope in SCOPES if (cost := found.action(scope))}
  if device.clock is None or not {"F"} < actions.keys():
    return None
  costs = _costs(actions, found.every_tick.most, schedule.stages, schedule.devices)
  timeline = simulate(schedule, costs, execution="coupled", slack=slack)
  return Estimate(timeline, (timeline.makespan + found.once.most) / device.clock)


def _costs(actions: Mapping[str, Cost], tick: int, stages: int, devices: int) -> Costs:
  """Makes costs of cycles: every action also pays for the tick that it runs on.

  Where an action has conditionals of its own, the last stage is given the dearest way through them
  and the others the cheapest. A fused B counts as two halves, I and W. S and T, the passes of a
  sharded head, take three P-ths of a head's forward, as `Costs.head` has it: the sum of both times
  P / 3 is that forward.
  """

  def by_stage(name: str, share: float = 1) -> list[float]:
    cost = actions[name]
    least, most = (share * (cycles + tick) for cycles in (cost.least, cost.most))
    return [least] * (stages - 1) + [most]

  forward = by_stage("F")
  # Embedding, and the head with its gradient, which the last stage's F ends with.
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
