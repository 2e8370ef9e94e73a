"""What it costs that unlike stages share arrays of one shape: bytes that are held, and needed.

Every device holds as much as the hungriest needs of each kind, and the hungriest of one kind need
not be that of another. The waste of a kind is what all devices hold over what all need.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.parallel.flat import ROW, Flat
from jaxpipe.parallel.replicas import owned
from jaxpipe.pipeline.batch import microbatches
from jaxpipe.pipeline.costs.workspace import live_peak
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.device.switched_stages import SwitchedStages
from jaxpipe.pipeline.executor import Execution, lower_on
from jaxpipe.pipeline.layer.residuals import AUTO, Policy, residual_policy
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.schedules import Schedule

Tree = Any


@dataclasses.dataclass(frozen=True)
class PackingReport:
  """Bytes of one device by kind.

  Attributes:
    held: kind -> bytes that every device holds. `workspace`, the inside of an action, is an
      estimate; `shared` are weights that stages borrow, and their gradients.
    needed: kind -> bytes that each device's own stages need, without padding.
  """

  held: Mapping[str, int]
  needed: Mapping[str, Sequence[int]]

  @property
  def waste(self) -> dict[str, float]:
    """Kind -> held over needed, of all devices; of what nobody needs, 1."""
    devices = len(next(iter(self.needed.values())))
    found = {kind: (devices * held, sum(self.needed[kind])) for kind, held in self.held.items()}
    return {kind: held / needed if needed else 1.0 for kind, (held, needed) in found.items()}

  @property
  def hungriest(self) -> int:
    """Bytes that the device needs which needs most."""
    return max(map(sum, zip(*self.needed.values(), strict=True)))

  @property
  def ratio(self) -> float:
    """What a device holds over what the hungriest needs."""
    return sum(self.held.values()) / self.hungriest

  def __str__(self) -> str:
    lines = ["kind                held KiB  needed by each device, KiB"]
    for kind, held in self.held.items():
      each = " ".join(f"{n / 2**10:10,.0f}" for n in self.needed[kind])
      lines.append(f"{kind:14} {held / 2**10:13,.0f} {each}  x {self.waste[kind]:.2f}")
    lines.append(
      f"total {sum(self.held.values()) / 2**10:,.0f} KiB, {self.ratio:.2f} of what the hungriest"
      f" device needs ({self.hungriest / 2**10:,.0f})"
    )
    return "\n".join(lines)


def packing_report(
  stack: Any,
  schedule: Schedule,
  mesh: Mesh,
  example_batch: Tree,
  *,
  residuals: str | Policy = AUTO,
  moments: int = 2,
) -> PackingReport:
  """Counts what a packed stack holds and needs; compiles nothing.

  Args:
    stack: a `LayerStack` of unlike layers.
    schedule, mesh, residuals: as for `pipeline_value_and_grad`.
    example_batch: a batch or its shapes.
    moments: float32 copies of the parameters that the optimizer keeps, such as Adam's two.

  Raises:
    ValueError: the stack is uniform, and nothing is packed.
  """
  stack = stack.laid_out(schedule)
  if stack.uniform:
    raise ValueError("the stack's layers are alike: they lie stacked, and nothing is packed")
  policy = residual_policy(residuals, stack.uniform)
  program = lower_on(schedule, mesh, policy, 0, head_apart=False)
  pipeline = Execution(stack, program, mesh, schedule, policy)
  found: list[PackingReport] = []

  def local(params: Tree, state: Tree, batch: Tree, key: jax.Array) -> tuple[()]:
    device, _ = pipeline.build(params, state, batch, key)
    found.append(_report(device, schedule, moments))
    return ()

  def start(params: Tree, state: Tree, batch: Tree, key: jax.Array) -> Any:
    cut = microbatches(batch, schedule.microbatches, pipeline.shards)
    return pipeline.over_mesh(local, ())(params, state, cut, key)

  key = jax.eval_shape(jax.random.key, 0)
  jax.eval_shape(start, stack.param_shapes(), pipeline.state_shapes, example_batch, key)
  return found[-1]


def _report(device: Device, schedule: Schedule, moments: int) -> PackingReport:
  stages, program = device.stage, device.local.program
  assert isinstance(stages, SwitchedStages)
  packed, placement = stages.packed, schedule.placement
  own = owned(placement)
  holds = [
    [placement.stage(d, v) for v in range(placement.chunks)] for d in range(placement.devices)
  ]
  slots, floats = program.slots, stages.boundaries
  each: dict[str, list[int]] = {
    "parameters": [sum(_used(packed.params[s]) for s in mine) for mine in own],
    "optimizer": [
      moments * sum(_used(packed.params[s], widened=True) for s in mine) for mine in own
    ],
    "state": [sum(_used(packed.state[s]) for s in mine) for mine in own],
    "gradients": [sum(_used(packed.params[s], widened=True) for s in mine) for mine in holds],
    "activations": [slots["activations"] * max(_used(floats[s]) for s in mine) for mine in holds],
    "gradient_ring": [
      slots["gradients"] * max(_used(floats[s + 1], floats_only=True) for s in mine)
      for mine in holds
    ],
  }
  bytes_of_row = [ROW * shape.dtype.itemsize for shape in stages.layout.arenas.shapes]
  rows = stages.layout.arenas.cells(program)[1]
  each["saved"] = [int(sum(n * b for n, b in zip(row, bytes_of_row, strict=True))) for row in rows]
  inside = [_inside(one) for one in stages.splits]
  each["workspace"] = [max(inside[s] for s in mine) for mine in holds]
  state = device.start()
  arenas = state.pools[: len(bytes_of_row)]
  row_bytes = sum(w * jnp.dtype(n).itemsize for n, w in packed.widths.items())
  wide_bytes = sum(w * wide(jnp.dtype(n)).itemsize for n, w in packed.widths.items())
  state_bytes = sum(w * jnp.dtype(n).itemsize for n, w in packed.state_widths.items())
  borrowed = [
    sum(_leaf_bytes(stages.shared[owner]) for s in mine for owner in packed.borrowed[s].values())
    for mine in holds
  ]
  each["shared"] = [2 * n for n in borrowed]
  held = {
    "parameters": len(own[0]) * row_bytes,
    "optimizer": moments * len(own[0]) * wide_bytes,
    "state": len(own[0]) * state_bytes,
    "gradients": _bytes(state.grads["layers"]),
    "activations": _bytes(state.activations),
    "gradient_ring": _bytes(state.gradients),
    "saved": _bytes(arenas),
    "workspace": max(inside),
    "shared": _bytes(dict(stages.shared)) + _bytes(state.grads["shared"]),
  }
  return PackingReport(held, each)


def _used(flat: Flat, *, widened: bool = False, floats_only: bool = False) -> int:
  """Bytes of a layout's leaves."""
  dtypes = {name: jnp.dtype(name) for name in flat.used}
  return sum(
    flat.used[name] * (wide(dtype) if widened else dtype).itemsize
    for name, dtype in dtypes.items()
    if not floats_only or jnp.issubdtype(dtype, jnp.inexact)
  )


def _inside(one: Any) -> int:
  parts = (one.forward, one.recompute, one.backward, one.input_grad, one.weight_grad)
  return max(live_peak(part.equations, part.outputs) for part in parts if part)


def _leaf_bytes(leaf: Any) -> int:
  return int(math.prod(leaf.shape) * leaf.dtype.itemsize)


def _bytes(tree: Tree) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
