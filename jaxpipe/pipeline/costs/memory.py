"""What a step holds on each device by kind, known before anything is compiled.

Rings, pools and sums are the executor's own: it is traced up to its first tick, and what it has
allocated there is counted. What the inside of an action needs is estimated (`workspace`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxpipe.parallel.mesh import FSDP
from jaxpipe.parallel.placing import shardings
from jaxpipe.pipeline.costs.workspace import tree_bytes, workspace
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.pipeline.update.slots import Slots, StateLayouts, is_part, is_slots
from jaxpipe.pipeline.update.variables import Variables
from jaxpipe.schedules import Schedule
from jaxpipe.stack.stack import LayerStack

Tree = Any

_RINGS = ("activations", "gradient_ring", "saved", "vocabulary", "weights")
_SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


@dataclasses.dataclass(frozen=True)
class MemoryReport:
  """Bytes that one device holds during a step, the same on every device.

  Attributes:
    bytes: kind -> bytes. `parameters`, `optimizer`, `batch`; `state`, what is not trained;
      `gradients`, sums over microbatches; `gathered`, weights that the device works with for the
      whole step, where it owns less of them (`fsdp`, replicas), and `weights`, those of the stages
      that G has gathered; `activations` and `gradient_ring`, what travels between stages; `saved`,
      what actions leave for later ones; `vocabulary`, what a shard of the head keeps; `shared`,
      weights that several unlike stages read; `workspace`, an estimate: the tick table, and the
      inside of the action that needs most.
    units: what an F, an I and a W change in what actions leave for later ones, over what F keeps:
      `memory` of `make_schedule`, with which schedules are planned within a limit.
    unit: bytes that F keeps of one stage and microbatch; 1 where it keeps nothing.
  """

  bytes: Mapping[str, int]
  units: tuple[float, float, float]
  unit: int

  @property
  def total(self) -> int:
    """All of them."""
    return sum(self.bytes.values())

  @property
  def rings(self) -> int:
    """What the schedule decides."""
    return sum(self.bytes[k] for k in _RINGS)

  def error(self, compiled: jax.stages.Compiled) -> float:
    """Returns predicted over compiled bytes, less one.

    Args:
      compiled: a step, or only its gradients; arguments, results and temporaries are counted, what
        is donated once.

    Raises:
      ValueError: the platform has no memory analysis.
    """
    found = compiled.memory_analysis()
    if found is None:
      raise ValueError("this platform's compiler says nothing about memory")
    given = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return self.total / float(given + found.temp_size_in_bytes) - 1

  def __str__(self) -> str:
    rows = [*self.bytes.items(), ("total", self.total)]
    size, name = next((s, name) for s, name in _SIZES if self.total >= s or s == 1)
    return "\n".join(f"{kind.replace('_', ' '):14} {n / size:12,.2f} {name}" for kind, n in rows)


def memory_report(
  stack: LayerStack,
  schedule: Schedule,
  mesh: Mesh,
  example_batch: Tree,
  *,
  residuals: str | Policy = AUTO,
  slack: int = 0,
  optimizer: Any = None,
  averages: bool = False,
) -> MemoryReport:
  """Predicts a step's memory.

  Args:
    stack: the `LayerStack`.
    schedule, mesh, residuals, slack: as for `pipeline_value_and_grad`.
    example_batch: a batch or its shapes, leaves `[B, ...]`.
    optimizer: an optax transformation, whose state is in float32 at least and lies like the
      parameters.
    averages: whether a moving average of the parameters is kept, in float32 at least.

  Raises:
    ValueError, ScheduleError: as for `pipeline_value_and_grad`.
  """
  execution = Execution.of(stack, schedule, mesh, residuals=residuals, slack=slack)
  laid_out, shapes = execution.stack, execution.stack.param_shapes()

  def stored(tree: Tree) -> int:
    """Bytes that one device holds of a placed tree of the shape of the parameters, or of state."""
    places = shardings(tree, laid_out, schedule, mesh)
    pairs = zip(jax.tree.leaves(places), jax.tree.leaves(tree), strict=True)
    return sum(
      math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for place, leaf in pairs
    )

  def widened(params: Tree) -> Tree:
    return jax.tree.map(lambda p: p.astype(wide(p.dtype)), params)

  def moments_of(params: Tree) -> Tree:
    return optimizer.init(widened(params))

  moments = jax.eval_shape(moments_of, shapes) if optimizer else ()
  # What a device owns of the parameters is an argument of the step, and stays beside what is
  # gathered from it.
  gathers = schedule.placement.replicated or dict(mesh.shape).get(FSDP, 1) > 1
  held, (kept, waits) = execution.inspect(
    example_batch, lambda device: (_held(device, gathers), _saved_bytes(device))
  )
  unit = kept or 1  # a layer that only adds a bias keeps nothing, and all is divided by it
  return MemoryReport(
    {
      "parameters": stored(shapes),
      "optimizer": _optimizer_bytes(moments, Variables.of(stack, schedule, mesh), stored),
      **({"average": stored(jax.eval_shape(widened, shapes))} if averages else {}),
      "batch": tree_bytes(example_batch) // execution.shards,
      **({"state": stored(execution.state_shapes)} if laid_out.has_state else {}),
      **held,
    },
    (kept / unit, (waits - kept) / unit, -waits / unit),
    unit,
  )


def _optimizer_bytes(state: Tree, variables: Variables, stored: Callable[[Tree], int]) -> int:
  """Bytes that one device holds of an optimizer's state.

  Args:
    state: shapes, of placed parameters.
    variables: of the stack.
    stored: bytes of a part of it that is a placed tree of the parameters' structure.
  """
  layouts = StateLayouts(variables)

  def of_slots(slots: Slots) -> int:
    places, shapes = layouts.of(slots).specs, slots.arrays
    return sum(
      math.prod(NamedSharding(variables.mesh, places[name]).shard_shape(shape.shape))
      * shape.dtype.itemsize
      for name, shape in shapes.items()
    )

  def one(node: Any) -> int:
    if is_slots(node):
      return of_slots(node)
    return stored(node) if is_part(node) else tree_bytes(node)

  return sum(
    one(node)
    for node in jax.tree.leaves(state, is_leaf=lambda node: is_slots(node) or is_part(node))
  )


def _held(device: Device, gathers: bool) -> dict[str, int]:
  """Kind -> bytes of what a device holds beside its arguments; called inside `shard_map`."""
  carry = device.start()
  return {
    "gathered": tree_bytes((device.weights.kept(), device.context.params)) if gathers else 0,
    "weights": tree_bytes(carry.weights),
    "gradients": tree_bytes(carry.grads),
    "activations": tree_bytes(carry.activations),
    "gradient_ring": tree_bytes(carry.gradients),
    "saved": tree_bytes(carry.pools),
    "vocabulary": tree_bytes(carry.vocabulary),
    "shared": tree_bytes(device.context.params.get("shared", ())),
    "workspace": workspace(device, carry),
  }


def _saved_bytes(device: Device) -> tuple[int, int]:
  """Bytes that F keeps of one stage and microbatch, and bytes that wait for its W."""
  kept, waits = device.stage.saved_bytes()
  if device.context.program.keeps_input:
    kept += tree_bytes(device.context.x)
  return kept, waits
