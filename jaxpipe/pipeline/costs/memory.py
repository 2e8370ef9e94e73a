"""What a step holds on each device by kind, known before anything is compiled.

Rings, pools and sums are the executor's own: it is traced up to its first tick, and what it has
allocated there is counted. What the inside of an action needs is estimated (`workspace`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.parallel.mesh import FSDP
from jaxpipe.parallel.placing import map_param_trees, shardings
from jaxpipe.pipeline.batch import microbatches
from jaxpipe.pipeline.costs.workspace import workspace
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.executor import Execution, lower_on
from jaxpipe.pipeline.layer.residuals import AUTO, Policy, residual_policy
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.schedules import Schedule

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
  stack: Any,
  schedule: Schedule,
  mesh: Mesh,
  example_batch: Tree,
  *,
  residuals: str | Policy = AUTO,
  slack: int = 0,
  optimizer: Any = None,
) -> MemoryReport:
  """Predicts a step's memory.

  Args:
    stack: the `LayerStack`.
    schedule, mesh, residuals, slack: as for `pipeline_value_and_grad`.
    example_batch: a batch or its shapes, leaves `[B, ...]`.
    optimizer: an optax transformation, whose state is in float32 at least and lies like the
      parameters.

  Raises:
    ValueError, ScheduleError: as for `pipeline_value_and_grad`.
  """
  stack = stack.laid_out(schedule)
  policy = residual_policy(residuals, stack.uniform)
  program = lower_on(schedule, mesh, policy, slack, head_apart=stack.uniform)
  pipeline = Execution(stack, program, mesh, schedule, policy)
  # The pieces of `parameters` are a step's arguments, and stay beside what is gathered from them.
  gathers = schedule.placement.replicated or dict(mesh.shape).get(FSDP, 1) > 1
  found: dict[str, int] = {}
  saved: list[tuple[int, int]] = []

  def local(params: Tree, state: Tree, batch: Tree, key: jax.Array) -> tuple[()]:
    device, cells = pipeline.build(params, state, batch, key)
    found.update(_count(device, cells, gathers))
    saved.append(_saved_bytes(device))
    return ()

  shapes = stack.param_shapes()

  def stored(tree: Tree) -> int:
    here = lambda place, leaf: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize  # noqa: E731
    places = shardings(tree, stack, schedule, mesh)
    return sum(jax.tree.leaves(jax.tree.map(here, places, tree)))

  def moments_of(params: Tree) -> Tree:
    return optimizer.init(jax.tree.map(lambda p: p.astype(wide(p.dtype)), params))

  def start(params: Tree, state: Tree, batch: Tree, key: jax.Array) -> Any:
    cut = microbatches(batch, schedule.microbatches, pipeline.shards)
    return pipeline.over_mesh(local, ())(params, state, cut, key)

  key = jax.eval_shape(jax.random.key, 0)
  jax.eval_shape(start, shapes, pipeline.state_shapes, example_batch, key)
  moments = jax.eval_shape(moments_of, shapes) if optimizer else ()
  kept, waits = saved[-1]
  unit = kept or 1  # a layer that only adds a bias keeps nothing
  return MemoryReport(
    {
      "parameters": stored(shapes),
      "optimizer": sum(jax.tree.leaves(map_param_trees(stored, moments, _bytes))),
      "batch": _bytes(example_batch) // pipeline.shards,
      **({"state": stored(pipeline.state_shapes)} if stack.has_state else {}),
      **found,
    },
    (kept / unit, (waits - kept) / unit, -waits / unit),
    unit,
  )


def _count(device: Device, cells: Any, gathers: bool) -> dict[str, int]:
  """What one device holds beside what it is given; inside `shard_map`."""
  state = device.start()
  return {
    "gathered": _bytes((device.weights.kept(), device.local.params)) if gathers else 0,
    "weights": _bytes(state.weights),
    "gradients": _bytes(state.grads),
    "activations": _bytes(state.activations),
    "gradient_ring": _bytes(state.gradients),
    "saved": _bytes(state.pools),
    "vocabulary": _bytes(state.vocabulary),
    "shared": _bytes(device.local.params.get("shared", ())),
    "workspace": workspace(device, state, cells),
  }


def _saved_bytes(device: Device) -> tuple[int, int]:
  """What F keeps of one stage and microbatch, and what W waits for."""
  kept, waits = device.stage.saved_bytes()
  return kept + (_bytes(device.local.x) if device.local.program.keeps_input else 0), waits


def _bytes(tree: Tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
